"""MoE: an nn.Module with router, experts and an optional shared expert, in the parameter names of Qwen3-MoE."""

import weakref

import torch
from torch import nn

from ._library import GATED_ACTIVATIONS
from .arguments import ACTIVATIONS, LAYOUTS, ROUTERS, RULES, check_choice
from .autograd import after_last_backward, in_backward, is_checkpointed
from .functional import experts, experts_general, layer, route
from .routers import EXTRA_ROUTERS, check_groups, update_router_bias
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


def _forget_recomputation(moe):
    if moe is not None and moe._aux_before is not None:
        moe.aux_loss, moe._aux_before = moe._aux_before, None


class MoE(nn.Module):
    """x [..., d] -> [..., d]; the load-balance loss of the last forward is in `aux_loss`.

    hidden_size, intermediate_size, num_experts, k    d, n, E, K
    router, groups, topk_groups, scale, z_loss    as in machmoe.route; activation, w1_layout, alpha, limit, recompute as in machmoe.experts
    router_bias   True: a selection bias in the buffer gate.e_score_correction_bias, moved by update_bias()
    jitter        eps: while training the router sees x times uniform noise in [1 - eps, 1 + eps] (Switch Transformer, arXiv 2101.03961)
    routing       "topk", or "token-rounding": while training, rows per expert are rounded to multiples of `tile` by `rule`;
                  in evaluation it is plain top-K
    shared_intermediate_size   adds a shared SwiGLU expert of that size
    bias          biases b1 and b2
    expert_counts holds the counts [E] of the last forward of a layer with router_bias
    Parameters: gate.weight [E, d], experts.gate_up_proj [E, 2n, d], experts.down_proj [E, d, n], in Qwen3-MoE's names; shared_expert.*.
    On the meta device nothing is initialised: call to_empty() and reset_parameters().
    """

    def __init__(
        self, hidden_size, intermediate_size, num_experts, k, *, router="softmax_topk_norm", router_bias=False, groups=1, topk_groups=1, scale=1.0,
        z_loss=0.0, jitter=0.0, activation="swiglu", w1_layout="concatenated", routing="topk", tile=128, rule="nr_f",
        shared_intermediate_size=None, bias=False, alpha=1.702, limit=None, recompute=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        check_choice(router, "router", ROUTERS | dict.fromkeys(EXTRA_ROUTERS))
        check_groups(num_experts, k, groups, topk_groups)
        check_choice(activation, "activation", ACTIVATIONS)
        check_choice(w1_layout, "w1_layout", LAYOUTS)
        check_choice(rule, "rule", RULES)
        check_choice(routing, "routing", ("topk", "token-rounding"))
        if routing == "token-rounding" and (router_bias or groups > 1 or scale != 1.0):
            raise ValueError("routing is 'token-rounding', which ranks by the scores alone, expected router_bias False, groups 1 and scale 1.0")
        self.k, self.router, self.routing, self.tile, self.rule, self.jitter = k, router, routing, tile, rule, jitter
        self.choice = {"router": router, "groups": groups, "topk_groups": topk_groups, "scale": scale, "z_loss": z_loss}
        self.options = {"activation": activation, "w1_layout": w1_layout, "alpha": alpha, "limit": limit, "recompute": recompute}
        gated = ACTIVATIONS[activation] < GATED_ACTIVATIONS
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        if router_bias:
            self.gate.register_buffer("e_score_correction_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.experts = Experts(hidden_size, intermediate_size, num_experts, gated=gated, bias=bias, device=device, dtype=dtype)
        self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, device, dtype) if shared_intermediate_size else None
        self.aux_loss = self.expert_counts = None
        self._aux_before = None  # while a checkpoint recomputes a forward: the aux_loss of the last one
        if not self.gate.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self):
        """W ~ N(0, 1 / fan-in), biases zero; the shared expert as nn.Linear."""
        nn.init.normal_(self.gate.weight, std=self.gate.weight.shape[1] ** -0.5)
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)
        self.experts.reset_parameters()
        if self.shared_expert is not None:
            for linear in self.shared_expert.children():
                linear.reset_parameters()

    @property
    def router_bias(self):
        return getattr(self.gate, "e_score_correction_bias", None)

    def update_bias(self, rate=1e-3, group=None):
        """After an optimiser step: moves the selection bias towards equal counts of the last forward (machmoe.update_router_bias).

        group   of torch.distributed, over whose ranks the counts are summed first; without it the ranks of a data-parallel run would drift apart
        """
        if self.router_bias is None or self.expert_counts is None:
            raise RuntimeError("update_bias needs a layer with router_bias=True that has run a forward")
        counts = self.expert_counts
        if group is not None:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=group)
        update_router_bias(self.router_bias, counts, rate)

    def _apply(self, fn, *args, **kwargs):
        """Moves and casts the layer. The selection bias stays fp32: steps of update_bias would vanish in bf16."""
        bias = self.router_bias
        super()._apply(fn, *args, **kwargs)
        if bias is not None:
            moved = self.router_bias
            self.gate.e_score_correction_bias = moved.float() if bias.is_meta or moved.is_meta else bias.to(moved.device)
        return self

    def __getstate__(self):
        return self.__dict__ | {"aux_loss": None, "_aux_before": None}  # part of an autograd graph: copies and pickles go without it

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        e = self.experts
        options = self.options | {"b1": e.b1, "b2": e.down_proj_bias, "addend": None if self.shared_expert is None else self.shared_expert(x)}
        rounding = self.training and self.routing == "token-rounding"
        jitter = self.jitter if self.training else 0.0
        if not rounding and not jitter and self.router_bias is None:
            out, aux = layer(x, self.gate.weight, e.w1, e.down_proj, self.k, **self.choice, **options)
            return self._noted(out, aux).view(shape)
        logits = self.gate(x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter) if jitter else x)
        ids, weights, self.expert_counts, aux = route(logits, self.k, router_bias=self.router_bias, **self.choice)
        if rounding:
            scores = logits.float().sigmoid() if self.router in EXTRA_ROUTERS else logits.float().softmax(-1)
            rounded = token_round(scores, self.k, self.tile, self.rule, renormalize=self.router not in ("softmax_topk", "sigmoid_topk"))
            return self._noted(experts_general(x, e.w1, e.down_proj, rounded, **options), aux).view(shape)
        return self._noted(experts(x, e.w1, e.down_proj, ids, weights, **options), aux).view(shape)

    def _noted(self, out, aux):
        """out, with aux in aux_loss. That of a checkpoint's recomputation holds all that was recomputed: when the experts' backward is through,
        the one before it comes back."""
        if is_checkpointed():
            if not in_backward():
                self._aux_before = None
            elif self._aux_before is None:
                self._aux_before = self.aux_loss
            if out.grad_fn is not None:
                module = weakref.ref(self)
                after_last_backward(out, lambda: _forget_recomputation(module()))
        self.aux_loss = aux
        return out
