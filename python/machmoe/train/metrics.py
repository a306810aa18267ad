"""metrics.jsonl: one record a step, one a validation. A resumed run drops what lies beyond its checkpoint and continues the file."""

import json
import os
from pathlib import Path

from ..errors import UserError
from .checkpoint import write_atomically


class Metrics:
    def __init__(self, run, step):
        self.path = Path(run) / "metrics.jsonl"
        if self.path.is_file():
            kept = [record for record in read(self.path) if record["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.pending = []
        try:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, **record):
        self.pending.append(json.dumps(record) + "\n")

    def flush(self, durable=False):
        """Hands the pending records to the file; durable: down to the disk, as a checkpoint that is about to count on them needs."""
        try:
            left = memoryview("".join(self.pending).encode())
            while left:
                left = left[self.file.write(left) :]
            if durable:
                os.fsync(self.file.fileno())
        except OSError as error:
            fix = f"the checkpoints are intact. Make room, then --resume {self.path.parent}"
            raise UserError(f"cannot write {self.path}: {error.strerror}; {fix}") from error
        self.pending.clear()

    def close(self):
        self.file.close()


def read(path):
    """Records in order; a last line that a crash cut off is left out."""
    records = []
    with open(path) as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
