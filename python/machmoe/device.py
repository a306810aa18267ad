"""The --device flag of the commands."""

import torch

import machmoe

from .errors import UserError


def parse_device(name, ours=True):
    """The torch.device of that name, one that torch can use and, unless ours is False, the library too."""
    expected = f"--device {name}: expected cpu, cuda or cuda:<i>"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(expected) from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(expected)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    reason = machmoe.device_reason(device) if ours else ""
    if reason:
        raise UserError(f"--device {name}: {reason}")
    return device
