"""Checkpoints that survive anything: written beside the old ones, forced to the disk, then renamed; checked against a digest when read.

File = payload (torch.save) + trailer {magic, payload length, sha256 of the payload}."""

import hashlib
import io
import os
import struct
from pathlib import Path

import torch

from ..errors import UserError

MAGIC = b"machmoe1"
TRAILER = struct.Struct("<8sQ32s")
KEPT = 2


def checkpoints(run):
    """Paths in the run's folder, oldest first."""
    return sorted(Path(run).glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def write_atomically(path, content):
    """Either the whole content stands under this name after a crash, or what stood there before."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before is intact. Make room or choose another --out") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(run, step, state):
    """Writes checkpoint-<step>.pt, then drops those of later steps, left behind where a run was resumed before them, and all but the newest two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path = Path(run) / f"checkpoint-{step:08d}.pt"
    write_atomically(path, payload + TRAILER.pack(MAGIC, len(payload), hashlib.sha256(payload).digest()))
    earlier = [other for other in checkpoints(run) if other.name < path.name]
    for other in {*checkpoints(run)} - {path, *earlier[1 - KEPT :]}:
        other.unlink(missing_ok=True)
    return path


def load(path, device="cpu"):
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    payload, trailer = memoryview(content)[: -TRAILER.size], content[-TRAILER.size :]
    intact = len(trailer) == TRAILER.size and trailer == TRAILER.pack(MAGIC, len(payload), hashlib.sha256(payload).digest())
    if not intact:
        others = [str(other) for other in reversed(checkpoints(path.parent)) if other.name != path.name]
        fix = f"resume from an earlier one: --resume {others[0]}" if others else "there is no earlier one: start again"
        raise UserError(f"the checkpoint {path} ({len(content)} bytes) is truncated or damaged; {fix}")
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


def find(path):
    """The checkpoint that --resume means: a file, or the newest one of a run's folder."""
    path = Path(path)
    if path.is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"--resume {path}: there is no checkpoint-*.pt; give a run's folder or a checkpoint file")
    return found[-1]
