"""The model's MoE layer on machmoe: top-K or token rounding, with the parameter names of Qwen3-MoE."""

import machmoe
import torch
from torch import nn

ROUNDING_TILE = 128


class MachmoeMoE(nn.Module):
    """Router and experts: O and the load-balance loss."""

    def __init__(self, hidden, intermediate, num_experts, k, routing="topk", tile=ROUNDING_TILE):
        super().__init__()
        self.k, self.routing, self.tile = k, routing, tile
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.experts.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        w1, w2 = self.experts.gate_up_proj, self.experts.down_proj
        logits = self.gate(x)
        ids, weights, _, aux = machmoe.route(logits, self.k, router="softmax_topk_norm")
        if self.training and self.routing == "token-rounding":
            routing = machmoe.token_round(logits.float().softmax(-1), self.k, self.tile, renormalize=True)
            return machmoe.experts_general(x, w1, w2, routing).view(shape), aux
        return machmoe.experts(x, w1, w2, ids, weights).view(shape), aux
