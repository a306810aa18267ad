"""machmoe: Mixture-of-Experts layers for training, ahead-of-time C++/CUDA with a CPU backend (after SonicMoE, arXiv 2512.14080)."""

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
    """Why the library cannot use `device` ("cpu" or "cuda"); "" where it can."""
    return _ops.device_reason(device == "cuda")
