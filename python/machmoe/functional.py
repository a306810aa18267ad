"""The functions of machmoe: experts, experts_general, grouped_mlp, route, layer. Symbols as in arXiv 2512.14080."""

import torch
from torch.autograd.function import once_differentiable

from ._library import DTYPES, GATED_ACTIVATIONS, LISTS, ROWS, TOPK, accum_of, ops
from .routing import check_device, check_index, check_score

ACTIVATIONS = {"swiglu": 0, "swiglu_oai": 1, "geglu": 2, "reglu": 3, "relu2": 4, "relu": 5, "gelu": 6, "gelu_erf": 7, "silu": 8}
ROUTERS = {"topk_softmax": 0, "softmax_topk": 1, "softmax_topk_norm": 2}
LAYOUTS = ("concatenated", "interleaved")


def experts(
    x, w1, w2, topk_ids, topk_weights, *, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False, alpha=1.702, limit=None
):
    """O_t = addend_t + sum_k weights_tk (act(x_t W1_e^T + b1_e) W2_e^T + b2_e), e = ids_tk (arXiv 2512.14080, section 3).

    x            [T, d], bf16 (CUDA); bf16, fp32 or fp64 (CPU; fp64 runs the slow plain-loop specification)
    w1           [E, 2n, d]; [E, n, d] for an activation without a gate; or a pair (gate, up) of [E, n, d]. Last stride 1
    w2           [E, d, n]
    topk_ids     [T, K] int32 or int64; an id >= E drops that slot
    topk_weights [T, K] fp32, bf16 or fp16
    activation   swiglu, swiglu_oai, geglu, reglu (with a gate); relu2, relu, gelu, gelu_erf, silu
    w1_layout    "concatenated": all gate rows, then all up rows; "interleaved": gate and up rows alternate
    b1, b2       [E, 2n] in the layout of w1 (or [E, n], or a pair), [E, d]
    addend       [T, d], added to the result (residual, shared expert)
    recompute    True saves only x and the metadata; H is rebuilt in the backward
    alpha, limit of swiglu_oai (limit 7 unless given), and the clamp of swiglu

    Returns [T, d], differentiable once in x, w1, w2, topk_weights, b1, b2, addend. d and n are multiples of 8.
    Raises ValueError for wrong shapes or dtypes, RuntimeError with the library's sentence for what the backend refuses.
    """
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids is {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}, expected [T, K] both with T = {x.shape[0]} as x")
    check_index(topk_ids, "topk_ids")
    check_score(topk_weights, "topk_weights")
    check_device(x, "x", topk_ids=topk_ids, topk_weights=topk_weights)
    layer_args = _prepare(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    x = layer_args[0]
    if (topk_weights.dtype == torch.float64) != (x.dtype == torch.float64):
        topk_weights = topk_weights.to(accum_of(x.dtype))
    topk_weights = topk_weights.contiguous()
    metadata = ops.routing_topk(topk_ids.contiguous(), topk_weights.detach(), layer_args[3].shape[0])
    return _Experts.apply(*layer_args[:-1], topk_weights, metadata, None, (TOPK, topk_ids.shape[1], *layer_args[-1], _saves_h(recompute)))


def experts_general(
    x, w1, w2, routing, *, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False, alpha=1.702, limit=None
):
    """The experts for any machmoe.Routing: a token may have 0 to E experts. Differentiable in routing.score too; arguments as in `experts`."""
    layer_args = _prepare(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    x, w2 = layer_args[0], layer_args[3]
    if routing.num_tokens != x.shape[0] or routing.num_experts != w2.shape[0]:
        raise ValueError(f"routing is for {routing.num_tokens} tokens and {routing.num_experts} experts, expected T = {x.shape[0]} and E = {w2.shape[0]}")
    check_device(x, "x", routing=routing.metadata)
    score = routing.score.contiguous()
    if score.dtype != accum_of(x.dtype):
        raise ValueError(f"routing.score is {score.dtype}, expected {accum_of(x.dtype)} beside x of {x.dtype}: build the routing from scores of that dtype")
    return _Experts.apply(*layer_args[:-1], score, routing.metadata, None, (LISTS, 0, *layer_args[-1], _saves_h(recompute)))


def grouped_mlp(
    rows, counts, w1, w2, *, row_scores=None, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, recompute=False, alpha=1.702, limit=None
):
    """Experts on rows that were dispatched already (expert parallelism): y_r = s_r (act(rows_r W1_e^T + b1_e) W2_e^T + b2_e).

    rows        [R, d], grouped by expert in ascending order
    counts      [E] int32 or int64 on the device: rows of each expert; rows past sum(counts) return zero and cost nothing
    row_scores  [R] fp32, or None: 1

    Returns [R, d], differentiable once in rows, w1, w2, row_scores, b1, b2. Other arguments as in `experts`.
    """
    layer_args = _prepare(rows, w1, w2, b1, b2, None, activation, w1_layout, alpha, limit)
    rows, w2 = layer_args[0], layer_args[3]
    if counts.dim() != 1 or counts.shape[0] != w2.shape[0]:
        raise ValueError(f"counts is {tuple(counts.shape)}, expected [E] = [{w2.shape[0]}]")
    check_index(counts, "counts")
    check_device(rows, "rows", counts=counts, row_scores=row_scores)
    if row_scores is not None:
        check_score(row_scores, "row_scores")
        if row_scores.shape != rows.shape[:1]:
            raise ValueError(f"row_scores is {tuple(row_scores.shape)}, expected [R] = [{rows.shape[0]}]")
        row_scores = row_scores.to(accum_of(rows.dtype)).contiguous()
    counts = counts.to(torch.int32).contiguous()
    metadata = ops.routing_rows(counts, rows)
    return _Experts.apply(*layer_args[:-1], row_scores, metadata, counts, (ROWS, 0, *layer_args[-1], _saves_h(recompute)))


def route(logits, k, *, router="softmax_topk"):
    """Top-K router: (ids int32 [T, K], weights fp32 [T, K], counts int32 [E], aux fp32 scalar).

    logits  [T, E] fp32, bf16, fp16 or fp64; ties go to the lower expert id
    router  "topk_softmax": softmax over the selected logits; "softmax_topk": softmax over all, then top-K; "softmax_topk_norm": renormalised

    aux = E sum_e (counts_e / (T k)) mean_t softmax(logits)_te is the load-balance loss. Differentiable: weights and aux, in logits.
    """
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r}, expected one of {', '.join(ROUTERS)}")
    if logits.dim() != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits is {tuple(logits.shape)} with k = {k}, expected [T, E] and 1 <= k <= E")
    check_score(logits, "logits")
    return _Route.apply(logits.contiguous(), k, ROUTERS[router])


def layer(
    x, router_w, w1, w2, k, *, router="softmax_topk", activation="swiglu", w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False, alpha=1.702,
    limit=None,
):  # fmt: skip
    """Router and experts in one autograd.Function: (O [T, d], aux scalar).

    router_w [E, d], used in the dtype of x: logits = x router_w^T; k experts per token; other arguments as in `route` and `experts`. The backward sums dS inside the
    router's gradient and adds the router's dX in the experts' last kernel.
    """
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r}, expected one of {', '.join(ROUTERS)}")
    layer_args = _prepare(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    x, w2 = layer_args[0], layer_args[3]
    if router_w.shape != (w2.shape[0], x.shape[1]):
        raise ValueError(f"router_w is {tuple(router_w.shape)}, expected [E, d] = [{w2.shape[0]}, {x.shape[1]}]")
    check_device(x, "x", router_w=router_w)
    return _Layer.apply(*layer_args[:-1], router_w.to(x.dtype), (k, ROUTERS[router], *layer_args[-1], _saves_h(recompute)))


# ---- argument checks -----------------------------------------------------------------------------------------------------------
def _pair(value, name):
    if not isinstance(value, (tuple, list)):
        return value, None
    if len(value) != 2:
        raise ValueError(f"{name} is a sequence of {len(value)} tensors, expected one tensor or a pair (gate, up)")
    return value


# dtypes of x and the weights on each device
_DATA_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float64), "cuda": (torch.bfloat16,)}


def _prepare(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit):
    """Checked and cast arguments: x, w1, w1_up, w2, b1, b1_up, b2, addend, (activation, alpha, limit, interleaved)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if w1_layout not in LAYOUTS:
        raise ValueError(f"w1_layout is {w1_layout!r}, expected one of {', '.join(LAYOUTS)}; a pair (gate, up) needs none")
    gated = ACTIVATIONS[activation] < GATED_ACTIVATIONS
    (w1, w1_up), (b1, b1_up) = _pair(w1, "w1"), _pair(b1, "b1")
    if b1 is not None and (b1_up is None) != (w1_up is None):
        raise ValueError("one of w1 and b1 is a pair, expected both to be one tensor, or both a pair (gate, up)")
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(f"x, w1, w2 have shapes {tuple(x.shape)}, {tuple(w1.shape)}, {tuple(w2.shape)}, expected [T, d], [E, 2n, d], [E, d, n]")
    num_experts, d, n = w2.shape
    if w1_up is not None and not gated:
        raise ValueError(f"w1 is a pair, expected one tensor [E, n, d]: {activation} has no gate")
    rows = 2 * n if gated and w1_up is None else n
    for tensor, name in ((w1, "w1"), (w1_up, "w1[1]")):
        if tensor is not None and tensor.shape != (num_experts, rows, d):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected [{num_experts}, {rows}, {d}] beside w2 of {tuple(w2.shape)} and {activation}")
    if x.shape[1] != d:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, d] with d = {d} as in w2")
    for tensor, name, width in ((b1, "b1", rows), (b1_up, "b1[1]", rows), (b2, "b2", d)):
        if tensor is not None and tensor.shape != (num_experts, width):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected [{num_experts}, {width}]")
    if addend is not None and addend.shape != x.shape:
        raise ValueError(f"addend is {tuple(addend.shape)}, expected the shape of x, {tuple(x.shape)}")
    tensors = [x, w1, w1_up, w2, b1, b1_up, b2, addend]
    device = x.device.type
    if device in _DATA_DTYPES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    known = _DATA_DTYPES.get(device)
    if known and tensors[0].dtype not in known:
        fix = f"cast x and the weights, or use torch.autocast({device!r}, torch.bfloat16)"
        raise ValueError(f"x is {tensors[0].dtype} on {device}, expected {' or '.join(map(str, known))}: {fix}")
    names = ("x", "w1", "w1[1]", "w2", "b1", "b1[1]", "b2", "addend")
    for tensor, name in zip(tensors, names, strict=True):
        if tensor is not None and (tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected {tensors[0].dtype} on {tensors[0].device} as x: cast it, or use autocast")
    if limit is None:
        limit = 7.0 if activation == "swiglu_oai" else 0.0
    tensors[0] = tensors[0].contiguous()
    if addend is not None:
        tensors[7] = tensors[7].contiguous()
    return *tensors, (ACTIVATIONS[activation], float(alpha), float(limit), w1_layout == "interleaved")


def _saves_h(recompute):
    """Whether a backward will read H; inside an autograd.Function gradients are always off."""
    return torch.is_grad_enabled() and not recompute


def _or_none(grad, needed):
    return grad if needed else None


# ---- autograd ------------------------------------------------------------------------------------------------------------------
class _Experts(torch.autograd.Function):
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


class _Route(torch.autograd.Function):
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


class _Layer(torch.autograd.Function):
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
        dx, drouter_w, *grads = ops.layer_backward(d_o, daux, *ctx.saved_tensors, *ctx.options, need[1] or need[2], need[3], need[4] or need[5], need[6])
        return *(_or_none(*pair) for pair in zip((dx, *grads, d_o, drouter_w), need, strict=False)), None
