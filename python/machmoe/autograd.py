"""The autograd.Functions of the experts, the router and the layer: which tensors are kept for the backward, which gradients are asked for."""

import torch
from torch.autograd.function import once_differentiable

from ._library import DTYPES, TOPK, ops


def saves_h(recompute):
    """Whether a backward will read H; inside an autograd.Function gradients are always off."""
    return torch.is_grad_enabled() and not recompute


def _or_none(grad, needed):
    return grad if needed else None


class Experts(torch.autograd.Function):
    """Saved: x, the weights themselves, H (unless recompute), metadata, and the scores of general routings."""

    @staticmethod
    def forward(ctx, x, w1, w1_up, w2, b1, b1_up, b2, addend, scores, metadata, counts, spec):
        kind, k, activation, alpha, limit, interleaved, save_h = spec
        row_scores = None if kind == TOPK else scores
        options = (kind, k, activation, alpha, limit, interleaved)
        save_h = save_h and any(ctx.needs_input_grad)
        o, h = ops.experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, metadata, counts, row_scores, *options, save_h)
        ctx.save_for_backward(x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, row_scores)
        ctx.options = options
        ctx.score_dtype = -1 if scores is None else DTYPES[scores.dtype]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o):
        x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, row_scores = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_w1, need_b1 = need[1] or need[2], need[4] or need[5]
        d_o = d_o.contiguous()
        dx, dw1, dw1_up, dw2, db1, db1_up, db2, dscore = ops.experts_backward(
            d_o, x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, row_scores, *ctx.options,
            need[0], need_w1, need[3], need_b1, need[6], ctx.score_dtype if need[8] else -1,
        )  # fmt: skip
        grads = [_or_none(*pair) for pair in zip((dx, dw1, dw1_up, dw2, db1, db1_up, db2, d_o, dscore), need, strict=False)]
        return *grads, None, None, None


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, router):
        ids, weights, counts, aux = ops.route_forward(logits, k, router)
        ctx.save_for_backward(logits, ids, weights, counts)
        ctx.router = router
        ctx.mark_non_differentiable(ids, counts)
        return ids, weights, counts, aux

    @staticmethod
    @once_differentiable
    def backward(ctx, _dids, dweights, _dcounts, daux):
        logits, ids, weights, counts = ctx.saved_tensors
        return ops.route_backward(dweights.contiguous(), daux, logits, ids, weights, counts, ctx.router), None, None


class Layer(torch.autograd.Function):
    """Saved: x, the weights themselves, logits, ids, weights, counts, H (unless recompute), metadata."""

    @staticmethod
    def forward(ctx, x, w1, w1_up, w2, b1, b1_up, b2, addend, router_w, spec):
        k, router, activation, alpha, limit, interleaved, save_h = spec
        logits = torch.mm(x, router_w.t())
        ids, weights, counts, aux = ops.route_forward(logits, k, router)
        metadata = ops.routing_topk(ids, weights, w2.shape[0])
        options = (activation, alpha, limit, interleaved)
        save_h = save_h and any(ctx.needs_input_grad)
        o, h = ops.experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, metadata, None, None, TOPK, k, *options, save_h)
        ctx.save_for_backward(x, router_w, w1, w1_up, w2, b1, b1_up, b2, h, metadata, logits, ids, weights, counts)
        ctx.options = (router, *options)
        return o, aux

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, daux):
        d_o = d_o.contiguous()
        need = ctx.needs_input_grad
        dx, drouter_w, *grads = ops.layer_backward(
            d_o, daux, *ctx.saved_tensors, *ctx.options, need[1] or need[2], need[3], need[4] or need[5], need[6]
        )
        return *(_or_none(*pair) for pair in zip((dx, *grads, d_o, drouter_w), need, strict=False)), None
