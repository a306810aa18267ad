"""Bytes to learn from: a file or a folder, read in an order that depends on nothing but the relative names, split, and cut into batches."""

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError

VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    name: str
    files: int
    train: torch.Tensor  # [bytes] uint8
    validation: torch.Tensor  # [bytes] uint8
    digest: str  # sha256 of all bytes: a resumed run must see the same text


def hidden(path):
    """Of no interest: hidden files and folders, installed packages."""
    return any(part.startswith(".") or part in ("site-packages", "dist-packages") for part in path.parts)


def load_corpus(path, megabytes, context):
    root = Path(path) if path else Path(sysconfig.get_path("stdlib"))
    if not root.exists():
        raise UserError(f"the corpus {root} does not exist; --corpus takes a text file or a folder")
    if root.is_file():
        files = [root]
    else:
        # A shuffle by the hash of the name: the validation split at the end is then like the training split.
        pattern = "*" if path else "*.py"
        try:
            files = [file for file in root.rglob(pattern) if file.is_file() and not hidden(file.relative_to(root))]
        except OSError as error:
            raise UserError(f"cannot read {error.filename} of the corpus: {error.strerror}") from error
        files.sort(key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())
    limit = int(megabytes * 2**20)
    text, used = bytearray(), 0
    for file in files:
        room = limit - len(text)
        try:
            with open(file, "rb") as stream:
                head = stream.read(8192)
                if b"\0" in head and len(files) > 1:  # not text
                    continue
                text += (head + stream.read(room))[:room]
        except OSError as error:
            raise UserError(f"cannot read {file} of the corpus: {error.strerror}") from error
        used += 1
        if len(text) >= limit:
            break
    needed = math.ceil(2 * (context + 1) / VALIDATION_SHARE)
    if len(text) < needed:
        kind = "is empty" if not text else f"has only {len(text)} bytes"
        raise UserError(f"the corpus {root} {kind}; --context {context} needs at least {needed} bytes of text")
    data = torch.frombuffer(text, dtype=torch.uint8)
    split = len(data) - int(len(data) * VALIDATION_SHARE)
    return Corpus(str(root), used, data[:split], data[split:], hashlib.sha256(text).hexdigest())


def bigram_entropy(data):
    """H(next byte | previous byte) in bits: what a model that sees one byte of context can reach at best."""
    data = data.cpu()
    pairs = torch.bincount(data[:-1].long() * 256 + data[1:].long(), minlength=1 << 16).view(256, 256).double()
    conditional = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    return -(pairs / pairs.sum() * conditional.clamp(min=torch.finfo(torch.double).tiny).log2()).sum().item()


class Batches:
    """Sequences of context + 1 bytes without replacement: each epoch shifts the text and permutes its windows by (seed, epoch).
    `position` counts the sequences handed out so far and is the whole state."""

    def __init__(self, data, context, batch, seed, device):
        self.data, self.context, self.batch, self.seed = data.to(device), context, batch, seed
        self.window = torch.arange(context + 1, device=device)
        self.position, self.epoch = 0, -1
        self.per_epoch = (len(data) - context) // context - 1  # windows that fit after any shift
        if self.per_epoch < 1:
            raise UserError(f"the training split has {len(data)} bytes, too few for --context {context}")

    def next(self):
        """The text and the order of an epoch lie on the device: within an epoch no byte comes from the host."""
        parts, missing = [], self.batch
        while missing:  # an epoch's last batch is filled from the following one
            parts.append(self._starts()[:missing])
            missing -= len(parts[-1])
            self.position += len(parts[-1])
        window = self.data[torch.cat(parts).unsqueeze(1) + self.window].long()
        return window[:, :-1], window[:, 1:]

    def _starts(self):
        """Of the sequences that are left of this epoch."""
        epoch, i = divmod(self.position, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            shift = torch.randint(self.context, (), generator=generator)
            self.starts = (torch.randperm(self.per_epoch, generator=generator) * self.context + shift).to(self.data.device)
            self.epoch = epoch
        return self.starts[i:]


def validation_batches(data, context, sequences, batch, device):
    """The same evenly spaced windows every time."""
    data = data.to(device)
    count = min(sequences, (len(data) - 1) // context)
    starts = torch.linspace(0, len(data) - context - 1, count).long().to(device)
    for chunk in starts.split(batch):
        window = data[chunk.unsqueeze(1) + torch.arange(context + 1, device=device)].long()
        yield window[:, :-1], window[:, 1:]
