"""`python -m machmoe train`: flags, one run or two, and the summary."""

import argparse
import json
import statistics
import time
from dataclasses import fields
from pathlib import Path

from ..errors import UserError, need
from ..table import print_table
from . import checkpoint
from .config import DTYPES, EXPERTS, PRESETS, ROUTINGS, Config, apply_choice, flag, make_config
from .loop import Trainer
from .metrics import read as read_metrics
from .plot import plot_losses

CHOICES = {"experts": EXPERTS, "routing": ROUTINGS, "dtype": DTYPES}
HELP = {
    "layers": "blocks of attention and MoE",
    "d": "hidden size",
    "n": "intermediate size of one expert",
    "num_experts": "experts E",
    "k": "active experts a token",
    "heads": "of the attention",
    "context": "bytes a sequence",
    "batch": "sequences a step",
    "steps": "updates of the weights",
    "lr": "peak learning rate",
    "min_lr": "final learning rate, as a share of --lr",
    "warmup": "steps of rising learning rate",
    "weight_decay": "of AdamW, on matrices",
    "clip": "largest gradient norm",
    "balance": "weight of the load-balance loss",
    "seed": "of the weights and the order of the text",
    "corpus": "text file or folder; default: Python's standard library source",
    "corpus_mb": "read at most this many MiB",
    "experts": "who computes the MoE layers",
    "routing": "top-K, or rows per expert rounded to multiples of 128 while training",
    "device": "cpu, cuda or cuda:<i>",
    "dtype": "of the products, weights stay fp32; bf16 on CUDA",
    "compile": "torch.compile the model as one graph",
    "val_every": "steps between validations",
    "val_sequences": "sequences a validation reads",
    "checkpoint_every": "steps between checkpoints",
    "log_every": "steps between reports",
    "sample": "bytes of text at the end",
}
RESUMABLE = {"device", "log_every", "checkpoint_every", "sample"}  # may change on --resume: they do not touch the numbers


def add_arguments(parser):
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes and schedule (default: tiny, about 3 minutes on 2 cores)")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/<time>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run: its folder, or one of its checkpoints")
    parser.add_argument(
        "--compare",
        metavar="A,B",
        help="train both from one seed and plot their curves: machmoe,torch, topk,token-rounding, or parts joined: machmoe+token-rounding,torch",
    )
    parser.add_argument("--plain", action="store_true", help="lines instead of a progress bar")
    for field in fields(Config):
        # Suppressed defaults: what is absent from the namespace comes from the preset.
        options = {"dest": field.name, "default": argparse.SUPPRESS, "help": HELP[field.name] + preset_values(field.name)}
        if field.type is bool:
            parser.add_argument(flag(field.name), action="store_true", **options)
        elif field.name in CHOICES:
            parser.add_argument(flag(field.name), choices=CHOICES[field.name], **options)
        else:
            parser.add_argument(flag(field.name), type=field.type, metavar={int: "N", float: "X", str: "S"}[field.type], **options)


def preset_values(name):
    """What the presets say, for the help: one value, or one for each."""
    values = {preset: getattr(config, name) for preset, config in PRESETS.items()}
    if len(set(values.values())) > 1:
        return " (" + ", ".join(f"{preset} {value}" for preset, value in values.items()) + ")"
    value = values["tiny"]
    return "" if value == "" or value is False else f" ({value})"


def run(arguments):
    for package in ("numpy", "tqdm", "rich", "matplotlib"):  # needed at the end too: better missed before the training
        need(package)
    given = {field.name: getattr(arguments, field.name) for field in fields(Config) if hasattr(arguments, field.name)}
    if given.get("corpus"):
        given["corpus"] = str(Path(given["corpus"]).resolve())  # a resumed run may start elsewhere
    if given.get("device", "cpu").startswith("cuda") and not arguments.resume:
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
    print(
        f"model   {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active: {config.layers} layers, d {config.d}, n {config.n}, "
        f"{config.k} of {config.num_experts} experts, {config.experts}, {config.routing}, {config.dtype} on {config.device}"
    )
    print(f"corpus  {corpus.name}: {text / 1e6:.1f} MB of {corpus.files} files, {len(corpus.validation) / 1e6:.2f} MB of them for validation")
    print(f"bigram  H(next byte | previous byte) = {trainer.bigram:.3f} bits/byte on the training split")
    print(f"run     {trainer.run}", flush=True)


def train(trainer, plain):
    """Trains to the end, then prints the summary and a sample."""
    describe(trainer)
    began = time.perf_counter()
    trainer.train(plain)
    summarise({trainer.config.experts: outcome(trainer)}, time.perf_counter() - began)
    if trainer.config.sample > 0:
        print(f"sample at temperature 0.8:\n{trainer.sample()}")


def compare(configs, folder, plain):
    outcomes, corpus, began = {}, None, time.perf_counter()
    for choice, config in configs.items():
        print(f"== {choice}")
        trainer = fresh(config, folder / choice, corpus)
        corpus = trainer.corpus
        describe(trainer)
        trainer.train(plain)
        outcomes[choice] = outcome(trainer)
        del trainer  # its memory must not count as the next one's
    curves = {choice: read_metrics(folder / choice / "metrics.jsonl") for choice in configs}
    title = "\n".join(f"{choice}: {cost(values)}" for choice, values in outcomes.items())
    plot_losses(folder / "compare.png", curves, outcomes[choice]["bigram"], title)
    checkpoint.write_atomically(folder / "compare.json", json.dumps(outcomes, indent=1).encode())
    summarise(outcomes, time.perf_counter() - began)
    print(f"curves  {folder / 'compare.png'}")


def outcome(trainer):
    """What a finished run is judged by; losses in bits/byte. The speed is the median of the reports, the first one left out where there are more:
    neither compilation nor a busy moment counts, and reports hold no time of validations and checkpoints."""
    records = [r for r in read_metrics(trainer.run / "metrics.jsonl") if "train_loss" in r]
    if not records:
        raise UserError(f"{trainer.run / 'metrics.jsonl'} holds no losses: restore it, or start a new run")
    last = [r["train_loss"] for r in records[-100:]]
    speeds = [r["tokens_per_s"] for r in records]
    return {
        "run": str(trainer.run),
        "train_loss": sum(last) / len(last),
        "val_loss": trainer.val_loss,
        "bigram": trainer.bigram,
        "tokens_per_s": statistics.median(speeds[trainer.config.log_every :] or speeds),
        "peak_mib": trainer.peak_mib,
    }


def cost(values):
    """Of an outcome, in a few words."""
    return f"{values['tokens_per_s']:,.0f} tokens/s" + (f", {values['peak_mib']:,.0f} MiB" if values["peak_mib"] else "")


def summarise(outcomes, seconds):
    table = need("rich.table").Table(title=f"{seconds / 60:.1f} minutes, losses in bits/byte")
    columns = {
        "train_loss": ("training,\nlast 100 steps", ".3f"),
        "val_loss": ("\nvalidation", ".3f"),
        "bigram": ("\nH(next | previous)", ".3f"),
        "tokens_per_s": ("\ntokens/s", ",.0f"),
        "peak_mib": ("peak memory,\nMiB", ",.0f"),
    }
    first = next(iter(outcomes.values()))
    columns = {key: column for key, column in columns.items() if first[key] is not None}
    table.add_column("")
    for title, _ in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for choice, values in outcomes.items():
        relative = {key: "" if values[key] == first[key] else f" ({values[key] / first[key] - 1:+.2%})" for key in columns}
        table.add_row(choice, *(format(values[key], style) + relative[key] for key, (_, style) in columns.items()))
    print_table(table)
    for values in outcomes.values():
        print(f"files   {values['run']}: {checkpoint.find(values['run']).name}, metrics.jsonl, loss.png")
        if values["val_loss"] >= values["bigram"]:
            print("note    the validation loss did not get below the bigram entropy; train longer (--steps)")
