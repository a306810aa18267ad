"""What a training run is made of: one flat record, filled from a preset and the command line, stored in every checkpoint."""

import math
from dataclasses import asdict, dataclass, fields, replace

from ..errors import UserError

EXPERTS = ("machmoe", "torch")
ROUTINGS = ("topk", "token-rounding")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Config:
    # model
    layers: int = 4
    d: int = 128  # hidden
    n: int = 128  # intermediate of one expert
    num_experts: int = 16  # E
    k: int = 2  # active experts a token
    heads: int = 4
    context: int = 256  # bytes
    # optimisation
    batch: int = 16  # sequences a step
    steps: int = 800
    lr: float = 3e-3
    min_lr: float = 0.1  # of lr, at the end of the cosine
    warmup: int = 40  # steps
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm
    balance: float = 0.01  # weight of the load-balance loss
    seed: int = 0
    # data
    corpus: str = ""  # file or folder; empty: Python's standard library
    corpus_mb: float = 16.0
    # execution
    experts: str = "machmoe"
    routing: str = "topk"
    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    # reports
    val_every: int = 100  # steps
    val_sequences: int = 128
    checkpoint_every: int = 100
    log_every: int = 10
    sample: int = 400  # bytes of text at the end

    def validate(self):
        sizes = ("layers", "d", "n", "num_experts", "k", "heads", "context", "batch", "steps")
        for name in (*sizes, "val_every", "val_sequences", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "corpus_mb"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.seed < 2**40:
            raise UserError(f"--seed is {self.seed}; it must be from 0 to 2^40 - 1")
        if self.k > self.num_experts:
            raise UserError(f"--k is {self.k} but there are only {self.num_experts} experts; choose --k <= --num-experts")
        if self.d % 8 or self.n % 8:
            raise UserError(f"--d {self.d} and --n {self.n} must be multiples of 8")
        if self.d % (2 * self.heads):
            raise UserError(f"--d {self.d} must be a multiple of 2 x --heads {self.heads}: rotary embedding turns pairs of a head's columns")
        for name, choices in (("experts", EXPERTS), ("routing", ROUTINGS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{flag(name)} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        if self.routing == "token-rounding" and self.experts == "torch":
            raise UserError("--routing token-rounding needs --experts machmoe: torch has no token rounding")
        if self.compile and self.experts == "torch" and self.dtype != "bf16":
            raise UserError("--compile with --experts torch needs --dtype bf16: torch cannot compile its grouped_mm in fp32")
        if self.device.startswith("cuda") and self.experts == "machmoe" and self.dtype != "bf16":
            raise UserError("--experts machmoe on CUDA computes in bf16 (weights stay fp32): use --dtype bf16, or --experts torch for the reference")
        return self

    @property
    def tokens_per_step(self):
        return self.batch * self.context

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def flag(name):
    return "--" + name.replace("_", "-")


# The 120m preset: 6 x (64 experts x 3 x 512 x 192 + attention) + embeddings = 120 M parameters, 8 of 64 experts active.
PRESETS = {
    "tiny": Config(),
    "small": Config(layers=6, d=256, n=128, num_experts=32, k=4, heads=8, context=512, batch=16, steps=2000, lr=2e-3, warmup=100, corpus_mb=32.0),
    "120m": Config(
        layers=6,
        d=512,
        n=192,
        num_experts=64,
        k=8,
        heads=8,
        context=1024,
        batch=32,
        steps=1000,
        lr=1e-3,
        warmup=100,
        corpus_mb=64.0,
        val_sequences=64,
        checkpoint_every=500,
        log_every=20,
    ),
}


def make_config(preset, overrides):
    return replace(PRESETS[preset], **overrides).validate()


def apply_choice(config, choice):
    """A choice of --compare: names of experts and routings joined by '+', such as 'torch' or 'machmoe+token-rounding'."""
    changes = {}
    for part in choice.split("+"):
        if part in EXPERTS:
            changes["experts"] = part
        elif part in ROUTINGS:
            changes["routing"] = part
        else:
            raise UserError(f"--compare does not know '{part}'; a choice is made of {', '.join(EXPERTS + ROUTINGS)}, joined by '+'")
    return replace(config, **changes).validate()
