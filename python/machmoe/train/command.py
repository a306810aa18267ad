"""`python -m machmoe train`: flags, one run or two, and the summary."""

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

from ..errors import UserError, need
from . import checkpoint
from .config import DTYPES, EXPERTS, PRESETS, ROUTINGS, Config, apply_choice, flag, make_config
from .loop import Trainer
from .metrics import read as read_metrics
from .plot import plot_losses

CHOICES = {"experts": EXPERTS, "routing": ROUTINGS, "dtype": DTYPES}
HELP = {
    "d": "hidden size", "n": "intermediate size of one expert", "num_experts": "experts E", "k": "active experts a token", "context": "bytes a sequence",
    "batch": "sequences a step", "lr": "peak learning rate", "min_lr": "final learning rate, as a share of --lr", "warmup": "steps",
    "clip": "largest gradient norm", "balance": "weight of the load-balance loss", "corpus": "text file or folder (default: Python's standard library source)",
    "corpus_mb": "read at most this many MiB", "experts": "who computes the MoE layers", "dtype": "of the products; weights stay fp32 (default: bf16 on CUDA)",
    "device": "cpu, cuda or cuda:<i>", "val_every": "steps between validations", "val_sequences": "sequences a validation reads",
    "checkpoint_every": "steps between checkpoints", "log_every": "steps between reports", "sample": "bytes of text at the end",
}
RESUMABLE = {"device", "log_every", "checkpoint_every", "sample"}   # may change on --resume: they do not touch the numbers


def add_arguments(parser):
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes and schedule that the other flags change (default: tiny, about 3 minutes on 2 cores)")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/<time>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run: its folder, or one of its checkpoints")
    parser.add_argument("--compare", metavar="A,B", help="train choices from one seed and plot their curves together, such as machmoe,torch or topk,token-rounding")
    parser.add_argument("--plain", action="store_true", help="lines instead of a progress bar")
    for field in fields(Config):
        # Suppressed defaults: what is absent from the namespace comes from the preset.
        options = {"dest": field.name, "default": argparse.SUPPRESS, "help": HELP.get(field.name)}
        if field.name == "compile":
            parser.add_argument("--compile", action="store_true", default=argparse.SUPPRESS, help="torch.compile the model")
        elif field.name in CHOICES:
            parser.add_argument(flag(field.name), choices=CHOICES[field.name], **options)
        else:
            parser.add_argument(flag(field.name), type=field.type, metavar=field.name.upper(), **options)


def run(arguments):
    given = {field.name: getattr(arguments, field.name) for field in fields(Config) if hasattr(arguments, field.name)}
    if given.get("device", "cpu").startswith("cuda"):
        given.setdefault("dtype", "bf16")
    if arguments.resume and arguments.compare:
        raise UserError("--resume continues one run; give the folder of one choice of the comparison")
    if arguments.resume:
        return resume(arguments, given)
    folder = arguments.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    config = make_config(arguments.preset, given)
    if arguments.compare:
        choices = arguments.compare.split(",")
        if len(choices) < 2 or len(set(choices)) != len(choices):
            raise UserError(f"--compare {arguments.compare}: give two different choices, such as machmoe,torch")
        return compare({choice: apply_choice(config, choice) for choice in choices}, folder, arguments.plain)
    train(fresh(config, folder), arguments.plain)


def fresh(config, folder, corpus=None):
    if checkpoint.checkpoints(folder):
        raise UserError(f"{folder} holds the checkpoints of an earlier run; continue it with --resume {folder}, or choose another --out")
    return Trainer(config, folder, corpus=corpus)


def resume(arguments, given):
    path = checkpoint.find(arguments.resume)
    state = checkpoint.load(path)
    fixed = {name for name in given if name not in RESUMABLE and given[name] != state["config"][name]}
    if fixed or arguments.out:
        names = ", ".join(sorted(flag(name) for name in fixed) + (["--out"] if arguments.out else []))
        raise UserError(f"--resume continues a run exactly as it began; leave out {names}")
    config = Config.from_dict(state["config"] | given).validate()
    trainer = Trainer(config, path.parent, state)
    print(f"resumed {path} at step {trainer.step}")
    train(trainer, arguments.plain)


def describe(trainer):
    config, corpus = trainer.config, trainer.corpus
    total, active = trainer.model.num_parameters()
    text = len(corpus.train) + len(corpus.validation)
    print(f"model   {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active: {config.layers} layers, d {config.d}, n {config.n}, "
          f"{config.k} of {config.num_experts} experts, {config.experts}, {config.routing}, {config.dtype} on {config.device}")
    print(f"corpus  {corpus.name}: {text / 1e6:.1f} MB of {corpus.files} files, {len(corpus.validation) / 1e6:.2f} MB of them for validation")
    print(f"bigram  H(next byte | previous byte) = {trainer.bigram:.3f} bits/byte on the training split")
    print(f"run     {trainer.run}", flush=True)


def train(trainer, plain):
    """Trains to the end, then prints the summary and a sample."""
    describe(trainer)
    began = time.perf_counter()
    trainer.train(plain)
    summarise({"": trainer}, time.perf_counter() - began)
    if trainer.config.sample > 0:
        print(f"sample at temperature 0.8:\n{trainer.sample()}")


def compare(configs, folder, plain):
    trainers, corpus, began = {}, None, time.perf_counter()
    for choice, config in configs.items():
        print(f"== {choice}")
        trainer = fresh(config, folder / choice, corpus)
        corpus = trainer.corpus
        describe(trainer)
        trainer.train(plain)
        trainers[choice] = trainer
    records = {choice: read_metrics(trainer.run / "metrics.jsonl") for choice, trainer in trainers.items()}
    plot_losses(folder / "compare.png", records, trainer.bigram)
    summarise(trainers, time.perf_counter() - began)
    rows = {choice: {"val_loss": t.val_loss, "tokens_per_s": t.tokens_per_s, "last_100_steps": last_mean(records[choice]), "bigram": t.bigram}
            for choice, t in trainers.items()}
    checkpoint.write_atomically(folder / "compare.json", json.dumps(rows, indent=1).encode())
    print(f"curves  {folder / 'compare.png'}")


def last_mean(records, count=100):
    losses = [r["train_loss"] for r in records if "train_loss" in r][-count:]
    return sum(losses) / len(losses)


def summarise(trainers, seconds):
    table = need("rich.table").Table(title=f"{seconds / 60:.1f} minutes, losses in bits/byte")
    for column in ("", "training, last 100 steps", "validation", "H(next | previous)", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    base = next(iter(trainers.values()))
    relative = lambda value, first: "" if value == first else f" ({value / first - 1:+.2%})"
    for choice, trainer in trainers.items():
        table.add_row(choice or trainer.config.experts, f"{last_mean(read_metrics(trainer.run / 'metrics.jsonl')):.3f}",
                      f"{trainer.val_loss:.3f}{relative(trainer.val_loss, base.val_loss)}", f"{trainer.bigram:.3f}",
                      f"{trainer.tokens_per_s:,.0f}{relative(trainer.tokens_per_s, base.tokens_per_s)}")
    need("rich.console").Console().print(table)
    for trainer in trainers.values():
        print(f"files   {trainer.run}: {checkpoint.checkpoints(trainer.run)[-1].name}, metrics.jsonl, loss.png")
        if trainer.val_loss >= trainer.bigram:
            print(f"note    the validation loss did not get below the bigram entropy; train longer (--steps {2 * trainer.config.steps})")
