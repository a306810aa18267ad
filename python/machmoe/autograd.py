"""The autograd.Functions of the experts, the router and the layer: which tensors are kept for the backward, which gradients are asked for."""

import functools

import torch
from torch.autograd import function

from ._library import DTYPES, TOPK, accum_of, ops


def once_differentiable(backward):
    """torch's decorator, without its cost where no graph of the backward is built: gradients are off there already. It takes results for
    constants where no incoming gradient needs one itself; ours depend on saved tensors too, so that the incoming ones are made to."""
    checked = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *gradients):
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        return checked(ctx, *(g if g is None or _is_batched(g) else g.detach().requires_grad_() for g in gradients))

    return run


def saves_h(recompute):
    """Whether a backward will read H; inside an autograd.Function gradients are always off."""
    return torch.is_grad_enabled() and not recompute


# torch's own: whether the graph that runs backward is retained, which backward runs, which hooks take saved tensors, and whether a gradient
# stands for many, which vmap takes one by one.
_is_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
_is_legacy_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: True)
_is_functorch_batch = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda _: True)


def _is_batched(gradient):
    return _is_legacy_batch(gradient) or _is_functorch_batch(gradient)


def in_backward():
    return not torch.compiler.is_compiling() and _graph_task() != -1


def is_checkpointed():
    """Whether this forward may be one that a checkpoint recomputes, or its recomputation."""
    return in_backward() or (not torch.compiler.is_compiling() and _saved_tensor_hooks(True) is not None)


def after_last_backward(tensor, call):
    """Calls `call` when the node of `tensor` has run its last backward."""
    tensor.grad_fn.register_hook(lambda *_: None if _is_retained() else call())


def reads_h_last(ctx, h, *gradients):
    """Whether no one reads H after this backward, so that dH may take its place."""
    if h is None or torch.compiler.is_compiling():
        return False
    if getattr(ctx, "h_is_gone", False):
        raise RuntimeError("H of this graph may have been overwritten by a backward that failed: run the forward again")
    ctx.h_is_gone = not _is_retained() and not any(_is_batched(g) for g in gradients if g is not None)
    return ctx.h_is_gone


class Experts(torch.autograd.Function):
    """call: (routing, counts, kind, options, save_h) in one, since every argument of an autograd.Function takes its time; routing is the ids of a
    top-K routing, the metadata of any other. Saved: x, the weights, the scores in fp32 (fp64), H (unless recompute), metadata."""

    @staticmethod
    def forward(ctx, x, w1, w1_up, w2, b1, b1_up, b2, addend, scores, call):
        routing, counts, kind, options, save_h = call
        save_h = save_h and any(ctx.needs_input_grad)
        ctx.score_dtype = -1 if scores is None else DTYPES[scores.dtype]
        if kind == TOPK:
            k = routing.shape[1]
            if scores.dtype != accum_of(x.dtype):
                scores = scores.to(accum_of(x.dtype))
            o, h, metadata = ops.topk_experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, routing, scores, *options, save_h)
        else:
            k, metadata = 0, routing
            o, h = ops.experts_forward(x, w1, w1_up, w2, b1, b1_up, b2, addend, metadata, counts, scores, kind, *options, save_h)
        ctx.save_for_backward(x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, scores)
        ctx.options = (kind, k, *options)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o):
        need, saved = ctx.needs_input_grad, ctx.saved_tensors
        d_o = d_o.contiguous()
        backward = ops.experts_backward_ if reads_h_last(ctx, saved[7], d_o) else ops.experts_backward
        *grads, dscore = backward(
            d_o, *saved, *ctx.options, need[0], need[1] or need[2], need[3], need[4] or need[5], need[6], ctx.score_dtype if need[8] else -1
        )
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
        backward = ops.layer_backward_ if reads_h_last(ctx, saved[8], d_o, daux) else ops.layer_backward
        dx, drouter_w, *grads = backward(d_o, daux, *saved, *ctx.options, need[1] or need[2], need[3], need[4] or need[5], need[6])
        return dx, *grads, d_o if need[7] else None, drouter_w, None
