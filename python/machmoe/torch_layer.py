"""The MoE layer on torch's grouped_mm: the reference that `train` and `bench` compare machmoe with, with the same parameters and names."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def topk_route(logits, k):
    """softmax_topk_norm: ids and fp32 weights [T, K], load-balance loss E sum_e (counts_e / (T K)) mean_t softmax(logits)_te."""
    num_experts = logits.shape[1]
    prob = logits.float().softmax(-1)
    weights, ids = prob.topk(k)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
    aux = num_experts * (counts.float() / ids.numel() * prob.mean(0)).sum()
    return ids, weights, aux


class Dispatch(Function):
    """Rows of x in the order of their experts. Its gradient gathers too: autograd's own would scatter with additions."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[torch.div(order, k, rounding_mode="floor")]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows):
        (inverse,) = ctx.saved_tensors
        return d_rows[inverse].view(-1, ctx.k, d_rows.shape[1]).sum(1), None, None, None


class Combine(Function):
    """Rows back in the order of (token, slot), gathered in both directions."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        (order,) = ctx.saved_tensors
        return d[order], None, None


def grouped_experts(x, w1, w2, ids, weights):
    """O [T, d] for x [T, d], w1 [E, 2n, d] (gate, then up), w2 [E, d, n], ids and weights [T, K]. SwiGLU."""
    tokens, k = ids.shape
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    expert, order = ids.flatten().int().sort(stable=True)
    counts = torch.zeros(w1.shape[0], dtype=torch.int32, device=x.device).scatter_add_(0, expert.long(), torch.ones_like(expert))
    offs = counts.cumsum(0, dtype=torch.int32)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    rows = Dispatch.apply(x, order, inverse, k)
    gate, up = F.grouped_mm(rows, w1.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offs)
    y = Combine.apply(y, order, inverse).view(tokens, k, -1)
    return (y * weights.to(y.dtype).unsqueeze(-1)).sum(1)


class TorchMoE(nn.Module):
    """machmoe.MoE on torch: the same state_dict (gate.weight, experts.gate_up_proj, experts.down_proj), the last load-balance loss in `aux_loss`."""

    def __init__(self, hidden, intermediate, num_experts, k):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.experts.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))
        self.aux_loss = None

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        ids, weights, self.aux_loss = topk_route(self.gate(x), self.k)
        return grouped_experts(x, self.experts.gate_up_proj, self.experts.down_proj, ids, weights).view(shape)
