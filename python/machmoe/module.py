"""MoE: an nn.Module with router, experts and an optional shared expert, in the parameter names of Qwen3-MoE."""

import torch
from torch import nn

from ._library import GATED_ACTIVATIONS
from .arguments import ACTIVATIONS, LAYOUTS, ROUTERS, RULES, check_choice
from .functional import experts_general, layer, route
from .routing import token_round


class Experts(nn.Module):
    """The weights of the experts: gate_up_proj [E, 2n, d] (up_proj [E, n, d] without a gate), down_proj [E, d, n], optional biases."""

    def __init__(self, hidden_size, intermediate_size, num_experts, *, gated=True, bias=False, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        rows = 2 * intermediate_size if gated else intermediate_size
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, rows, hidden_size, **factory)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))
        self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(num_experts, rows, **factory)) if bias else None)
        self.register_parameter("down_proj_bias", nn.Parameter(torch.empty(num_experts, hidden_size, **factory)) if bias else None)

    def reset_parameters(self):
        nn.init.normal_(self.w1, std=self.w1.shape[2] ** -0.5)
        nn.init.normal_(self.down_proj, std=self.down_proj.shape[2] ** -0.5)
        for bias in (self.b1, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def w1(self):
        return getattr(self, self.up_name)

    @property
    def b1(self):
        return getattr(self, f"{self.up_name}_bias")


class SharedExpert(nn.Module):
    """A SwiGLU MLP that every token passes, in Qwen's names."""

    def __init__(self, hidden_size, intermediate_size, device=None, dtype=None):
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **factory)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """x [..., d] -> [..., d]; the load-balance loss of the last forward is in `aux_loss`.

    hidden_size, intermediate_size, num_experts, k    d, n, E, K
    router        as in machmoe.route; activation, w1_layout, alpha, limit, recompute as in machmoe.experts
    routing       "topk", or "token-rounding": while training, rows per expert are rounded to multiples of `tile` by `rule`;
                  in evaluation it is plain top-K
    shared_intermediate_size   adds a shared SwiGLU expert of that size
    bias          biases b1 and b2
    Parameters: gate.weight [E, d], experts.gate_up_proj [E, 2n, d], experts.down_proj [E, d, n], shared_expert.*.
    On the meta device nothing is initialised: call to_empty() and reset_parameters().
    """

    def __init__(
        self, hidden_size, intermediate_size, num_experts, k, *, router="softmax_topk_norm", activation="swiglu", w1_layout="concatenated",
        routing="topk", tile=128, rule="nr_f", shared_intermediate_size=None, bias=False, alpha=1.702, limit=None, recompute=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        check_choice(router, "router", ROUTERS)
        check_choice(activation, "activation", ACTIVATIONS)
        check_choice(w1_layout, "w1_layout", LAYOUTS)
        check_choice(rule, "rule", RULES)
        check_choice(routing, "routing", ("topk", "token-rounding"))
        self.k, self.router, self.routing, self.tile, self.rule = k, router, routing, tile, rule
        self.options = {"activation": activation, "w1_layout": w1_layout, "alpha": alpha, "limit": limit, "recompute": recompute}
        gated = ACTIVATIONS[activation] < GATED_ACTIVATIONS
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, gated=gated, bias=bias, device=device, dtype=dtype)
        self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, device, dtype) if shared_intermediate_size else None
        self.aux_loss = None
        if not self.gate.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self):
        """W ~ N(0, 1 / fan-in), biases zero."""
        nn.init.normal_(self.gate.weight, std=self.gate.weight.shape[1] ** -0.5)
        self.experts.reset_parameters()
        if self.shared_expert is not None:
            for linear in self.shared_expert.children():
                linear.reset_parameters()

    def __getstate__(self):
        return self.__dict__ | {"aux_loss": None}  # part of an autograd graph: copies and pickles go without it

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        e = self.experts
        options = self.options | {"b1": e.b1, "b2": e.down_proj_bias, "addend": None if self.shared_expert is None else self.shared_expert(x)}
        if self.training and self.routing == "token-rounding":
            logits = self.gate(x)
            _, _, _, self.aux_loss = route(logits, self.k, router=self.router)
            rounded = token_round(logits.float().softmax(-1), self.k, self.tile, self.rule, renormalize=self.router != "softmax_topk")
            out = experts_general(x, e.w1, e.down_proj, rounded, **options)
        else:
            out, self.aux_loss = layer(x, self.gate.weight, e.w1, e.down_proj, self.k, router=self.router, **options)
        return out.view(shape)
