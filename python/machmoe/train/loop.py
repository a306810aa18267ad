"""The training loop: steps, validation, checkpoints, and an exact way back after an interruption."""

import contextlib
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ..device import parse_device
from ..errors import UserError, need
from . import checkpoint
from .config import Config
from .data import Batches, bigram_entropy, load_corpus, validation_batches
from .metrics import Metrics
from .metrics import read as read_metrics
from .model import LanguageModel
from .plot import plot_losses

BITS = 1 / math.log(2)  # losses are reported in bits per byte


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the checkpoint has been written."""


def learning_rate(config, step):
    """Linear warmup, then a cosine down to min_lr x lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


@contextlib.contextmanager
def stop_requests():
    """The first Ctrl-C or SIGTERM asks the loop to stop after its step; a second one stops at once."""
    requested = []

    def request(number, _frame):
        requested.append(number)
        if len(requested) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def adamw(model, config):
    """Weight decay on matrices, none on norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


class Progress:
    """A bar on a terminal, a line per report otherwise."""

    def __init__(self, config, start, plain):
        self.config, self.bar = config, None
        if not plain and sys.stderr.isatty():
            size = shutil.get_terminal_size()  # tqdm would draw nothing on a terminal that does not tell its size
            self.bar = need("tqdm").tqdm(
                total=config.steps,
                initial=start,
                ncols=size.columns,
                nrows=size.lines,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def report(self, step, loss, val_loss, tokens_per_s):
        validation = "" if math.isnan(val_loss) else f"  val {val_loss:.3f}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}{validation} bits/byte, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)
            return
        left = (self.config.steps - step) * self.config.tokens_per_step / max(tokens_per_s, 1e-9)
        print(f"step {step}/{self.config.steps}  loss {loss:.3f}{validation} bits/byte  {tokens_per_s:,.0f} tokens/s  ETA {left:.0f} s", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


class Trainer:
    def __init__(self, config: Config, run, state=None, corpus=None):
        self.config, self.run = config, Path(run)
        self.device = parse_device(config.device, ours=config.experts == "machmoe")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run's folder {self.run}: {error.strerror}; choose another --out") from error
        self.corpus = corpus or load_corpus(config.corpus, config.corpus_mb, config.context)
        self.bigram = bigram_entropy(self.corpus.train)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config)
        self.model.initialise(config.seed)
        self.model.to(self.device)
        self.optimiser = adamw(self.model, config)
        self.batches = Batches(self.corpus.train, config.context, config.batch, config.seed, self.device)
        self.step, self.val_loss, self.peak_mib = 0, float("nan"), None
        if state is not None:
            self.restore(state)
        self.loss = torch.compile(self.model.loss, fullgraph=True, dynamic=False) if config.compile else self.model.loss

    # ---- state -----------------------------------------------------------------------------------------------------------------
    def state(self):
        return {
            "config": self.config.to_dict(),
            "corpus": self.corpus.digest,
            "step": self.step,
            "position": self.batches.position,
            "val_loss": self.val_loss,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state):
        if state["corpus"] != self.corpus.digest:
            raise UserError(f"the corpus {self.corpus.name} is not the one this run began with (its bytes differ); restore it or start a new run")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.batches.position = state["step"], state["position"]
        self.val_loss = state["val_loss"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def save(self):
        self.metrics.flush(durable=True)
        self.saved_step = self.step
        return checkpoint.save(self.run, self.step, self.state())

    # ---- work ------------------------------------------------------------------------------------------------------------------
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def train_step(self):
        """One update; returns the cross-entropy in nats as a device scalar, so that the host can run ahead."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        with self.autocast():
            cross_entropy, balance = self.loss(*self.batches.next())
        (cross_entropy + self.config.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return cross_entropy.detach()

    @torch.no_grad()
    def validate(self):
        self.model.eval()
        total, count, config = 0.0, 0, self.config
        for tokens, targets in validation_batches(self.corpus.validation, config.context, config.val_sequences, config.batch, self.device):
            with self.autocast():
                cross_entropy, _ = self.model.loss(tokens, targets)
            total, count = total + cross_entropy.item() * len(tokens), count + len(tokens)
        self.model.train()
        self.val_loss = total / count * BITS
        return self.val_loss

    def train(self, plain=False):
        config = self.config
        self.metrics = Metrics(self.run, self.step)
        self.saved_step = self.step
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        progress = Progress(config, self.step, plain)
        losses, began = [], time.perf_counter()

        def log():
            """Losses since the last call; .tolist() waits for the device, so the clock is read after it."""
            nonlocal losses, began
            values = (torch.stack(losses) * BITS).tolist() if losses else []
            elapsed = time.perf_counter() - began
            first = self.step - len(values)
            speed = len(values) * config.tokens_per_step / elapsed if values else 0.0
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise UserError(f"the loss became {value} at step {first + i + 1}; lower --lr, then start again or --resume {self.run}")
                self.metrics.add(step=first + i + 1, train_loss=value, lr=learning_rate(config, first + i), tokens_per_s=round(speed, 1))
            if values:
                self.metrics.flush()
                progress.report(self.step, sum(values) / len(values), self.val_loss, speed)
            losses, began = [], time.perf_counter()

        try:
            with stop_requests() as stop:
                while self.step < config.steps and not stop:
                    losses.append(self.train_step())
                    last = self.step == config.steps
                    validates, saves = last or self.step % config.val_every == 0, last or self.step % config.checkpoint_every == 0
                    if validates or saves or self.step % config.log_every == 0:
                        log()
                    if validates:
                        self.metrics.add(step=self.step, val_loss=self.validate())
                    if saves:
                        self.save()
                    began = time.perf_counter() if validates or saves else began
                if stop:
                    log()
                    if self.saved_step != self.step:
                        self.save()
                    raise Interrupted(f"stopped at step {self.step}; continue with --resume {self.run}")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{config.device} ran out of memory at step {self.step + 1}: lower --batch {config.batch} or --context {config.context}"
            ) from error
        finally:
            progress.close()
            self.metrics.close()
        if self.device.type == "cuda":
            self.peak_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        self.plot()

    def plot(self):
        label = f"{self.config.experts}, {self.config.routing}"
        plot_losses(self.run / "loss.png", {label: read_metrics(self.run / "metrics.jsonl")}, self.bigram)

    def sample(self, prompt=b"def "):
        self.model.eval()
        with self.autocast():
            text = self.model.sample(prompt, self.config.sample, self.config.seed)
        self.model.train()
        return text.decode("utf-8", errors="replace")
