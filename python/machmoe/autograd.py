"""The autograd.Functions of the experts, the router and the layer: which tensors are kept for the backward, which gradients are asked for."""

import torch
from torch.autograd.function import once_differentiable

from ._library import DTYPES, TOPK, ops


def saves_h(recompute):
    """Whether a backward will read H; inside an autograd.Function gradients are always off."""
    return torch.is_grad_enabled() and not recompute


# torch's own, of its compiled backwards. Without it every graph counts as retained.
retains_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def place_of_dh(h):
    """H, where this backward is its last reader: dH may take its place. Not while the graph is retained or traced."""
    return None if torch.compiler.is_compiling() or retains_graph() else h


class Experts(torch.autograd.Function):
    """call: (routing, counts, kind, options, save_h) in one, since every argument of an autograd.Function takes its time; routing is the ids of a
    top-K routing, the metadata of any other. Saved: x, the weights themselves, H (unless recompute), metadata, and the scores of general routings."""

    @staticmethod
    def forward(ctx, x, w1, w1_up, w2, b1, b1_up, b2, addend, scores, call):
        routing, counts, kind, options, save_h = call
        save_h = save_h and any(ctx.needs_input_grad)
        if kind == TOPK:
            k, row_scores = routing.shape[1], None
            o, h, metadata = ops.topk_experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, routing, scores, *options, save_h)
        else:
            k, metadata, row_scores = 0, routing, scores
            o, h = ops.experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, metadata, counts, row_scores, kind, *options, save_h)
        ctx.save_for_backward(x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, row_scores)
        ctx.options = (kind, k, *options)
        ctx.score_dtype = -1 if scores is None else DTYPES[scores.dtype]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o):
        need, saved = ctx.needs_input_grad, ctx.saved_tensors
        d_o = d_o.contiguous()
        *grads, dscore = ops.experts_backward(
            d_o, place_of_dh(saved[7]), *saved, *ctx.options, need[0], need[1] or need[2], need[3], need[4] or need[5], need[6],
            ctx.score_dtype if need[8] else -1,
        )  # fmt: skip
        return *grads, d_o if need[7] else None, dscore, None


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, router):
        ids, weights, counts, aux = ops.route_forward(logits, k, router)
        ctx.save_for_backward(logits, ids, weights, counts)
        ctx.router = router
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)  # of what no loss uses: None, not zeros
        return ids, weights, counts, aux

    @staticmethod
    @once_differentiable
    def backward(ctx, _dids, dweights, _dcounts, daux):
        logits, ids, weights, counts = ctx.saved_tensors
        dweights = torch.zeros_like(weights) if dweights is None else dweights.contiguous()
        return ops.route_backward(dweights, daux, logits, ids, weights, counts, ctx.router), None, None


class Layer(torch.autograd.Function):
    """call: (k, router, options, save_h). Saved: x, the weights themselves, logits, ids, weights, counts, H (unless recompute), metadata."""

    @staticmethod
    def forward(ctx, x, w1, w1_up, w2, b1, b1_up, b2, addend, router_w, call):
        k, router, options, save_h = call
        logits = torch.mm(x, router_w.t())
        ids, weights, counts, aux = ops.route_forward(logits, k, router)
        save_h = save_h and any(ctx.needs_input_grad)
        o, h, metadata = ops.topk_experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, ids, weights, *options, save_h)
        ctx.save_for_backward(x, router_w, w1, w1_up, w2, b1, b1_up, b2, h, metadata, logits, ids, weights, counts)
        ctx.options = (router, *options)
        ctx.set_materialize_grads(False)
        return o, aux

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, daux):
        need, saved = ctx.needs_input_grad, ctx.saved_tensors
        d_o = torch.zeros_like(saved[0]) if d_o is None else d_o.contiguous()
        dx, drouter_w, *grads = ops.layer_backward(
            d_o, place_of_dh(saved[8]), daux, *saved, *ctx.options, need[1] or need[2], need[3], need[4] or need[5], need[6]
        )
        return dx, *grads, d_o if need[7] else None, drouter_w, None
