"""machmoe: Mixture-of-Experts layers for training, ahead-of-time C++/CUDA with a CPU backend (after SonicMoE, arXiv 2512.14080)."""

import torch as _torch

from ._library import ops as _ops
from .functional import experts, experts_general, grouped_mlp, layer, route
from .module import MoE
from .routers import update_router_bias
from .routing import Routing, token_round

__version__ = "0.1.0"
__all__ = [
    "MoE", "Routing", "build_info", "device_reason", "experts", "experts_general", "grouped_mlp", "layer", "route", "token_round",
    "update_router_bias",
]  # fmt: skip


def build_info():
    """One line: version, compiler, oneDNN, CUDA of the library."""
    return _ops.build_info()


def device_reason(device="cuda"):
    """Why the library cannot use `device`, a torch.device or its name; "" where it can."""
    kind = _torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"machmoe has no backend for {kind}, expected cpu or cuda"
    return _ops.device_reason(kind == "cuda")
