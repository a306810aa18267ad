"""The functions of machmoe: experts, experts_general, grouped_mlp, route, layer. Symbols as in arXiv 2512.14080."""

import torch

from ._library import LISTS, ROWS, TOPK, accum_of, ops
from .arguments import ROUTERS, check_choice, check_device, check_index, check_score, layer_arguments
from .autograd import Experts, Layer, Route, saves_h
from .routers import EXTRA_ROUTERS, router_z_loss, scored_route


def experts(
    x, w1, w2, topk_ids, topk_weights, *, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False,
    alpha=1.702, limit=None,
):  # fmt: skip
    """O_t = addend_t + sum_k weights_tk (act(x_t W1_e^T + b1_e) W2_e^T + b2_e), e = ids_tk (arXiv 2512.14080, section 3).

    x            [T, d], bf16 (CUDA); bf16, fp32 or fp64 (CPU; fp64 runs the slow plain-loop specification)
    w1           [E, 2n, d]; [E, n, d] for an activation without a gate; or a pair (gate, up) of [E, n, d]. Last stride 1
    w2           [E, d, n]
    topk_ids     [T, K] int32 or int64; an id >= E drops that slot
    topk_weights [T, K] fp32, bf16 or fp16; the backward reads fp32 ones again: changed in between, autograd raises
    activation   swiglu, swiglu_oai, geglu, reglu (with a gate); relu2, relu, gelu, gelu_erf, silu
    w1_layout    "concatenated": all gate rows, then all up rows; "interleaved": gate and up rows alternate
    b1, b2       [E, 2n] in the layout of w1 (or [E, n], or a pair), [E, d]
    addend       [T, d], added to the result (residual, shared expert)
    recompute    True saves only x, topk_weights and the metadata; H is rebuilt in the backward
    alpha, limit of swiglu_oai (limit 7 unless given), and the clamp of swiglu

    Returns [T, d], differentiable once in x, w1, w2, topk_weights, b1, b2, addend. d and n are multiples of 8.
    Raises ValueError for wrong shapes or dtypes, RuntimeError with the library's sentence for what the backend refuses.
    """
    check_index(topk_ids, "topk_ids")
    check_score(topk_weights, "topk_weights")
    check_device(x, "x", topk_ids=topk_ids, topk_weights=topk_weights)
    tensors, options = layer_arguments(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    x = tensors[0]
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_ids is {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}, expected [T, K] both with T = {x.shape[0]} as x"
        )
    if (topk_weights.dtype == torch.float64) != (x.dtype == torch.float64):
        topk_weights = topk_weights.to(accum_of(x.dtype))
    topk_weights = topk_weights.contiguous()
    return Experts.apply(*tensors, topk_weights, (topk_ids.contiguous(), None, TOPK, options, saves_h(recompute)))


def experts_general(
    x, w1, w2, routing, *, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False,
    alpha=1.702, limit=None,
):  # fmt: skip
    """The experts for any machmoe.Routing: a token may have 0 to E experts. Differentiable in routing.score too; arguments as in `experts`."""
    tensors, options = layer_arguments(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    x, w2 = tensors[0], tensors[3]
    if routing.num_tokens != x.shape[0] or routing.num_experts != w2.shape[0]:
        raise ValueError(
            f"routing is for {routing.num_tokens} tokens and {routing.num_experts} experts, expected T = {x.shape[0]} and E = {w2.shape[0]}"
        )
    check_device(x, "x", **{"routing": routing.metadata, "routing.score": routing.score})
    score = routing.score.contiguous()
    if score.dtype != accum_of(x.dtype):
        raise ValueError(
            f"routing.score is {score.dtype}, expected {accum_of(x.dtype)} beside x of {x.dtype}: build the routing from scores of that dtype"
        )
    return Experts.apply(*tensors, score, (routing.metadata, None, LISTS, options, saves_h(recompute)))


def grouped_mlp(
    rows, counts, w1, w2, *, row_scores=None, activation="swiglu", w1_layout="concatenated", b1=None, b2=None, recompute=False,
    alpha=1.702, limit=None,
):  # fmt: skip
    """Experts on rows that were dispatched already (expert parallelism): y_r = s_r (act(rows_r W1_e^T + b1_e) W2_e^T + b2_e).

    rows        [R, d], grouped by expert in ascending order
    counts      [E] int32 or int64 on the device: rows of each expert; rows past sum(counts) return zero and cost nothing
    row_scores  [R] fp32, or None: 1

    Returns [R, d], differentiable once in rows, w1, w2, row_scores, b1, b2. Other arguments as in `experts`.
    """
    tensors, options = layer_arguments(rows, w1, w2, b1, b2, None, activation, w1_layout, alpha, limit)
    rows, w2 = tensors[0], tensors[3]
    if counts.dim() != 1 or counts.shape[0] != w2.shape[0]:
        raise ValueError(f"counts is {tuple(counts.shape)}, expected [E] = [{w2.shape[0]}]")
    check_index(counts, "counts")
    check_device(rows, "rows", counts=counts, row_scores=row_scores)
    if row_scores is not None:
        check_score(row_scores, "row_scores")
        if row_scores.shape != rows.shape[:1]:
            raise ValueError(f"row_scores is {tuple(row_scores.shape)}, expected [R] = [{rows.shape[0]}]")
        row_scores = row_scores.to(accum_of(rows.dtype)).contiguous()
    if counts.dtype == torch.int64:
        counts = counts.clamp(max=2**31 - 1)
    counts = counts.to(torch.int32).contiguous()
    metadata = ops.routing_rows(counts, rows)
    return Experts.apply(*tensors, row_scores, (metadata, counts, ROWS, options, saves_h(recompute)))


def route(logits, k, *, router="softmax_topk", router_bias=None, groups=1, topk_groups=1, scale=1.0, z_loss=0.0):
    """Top-K router: (ids int32 [T, K], weights fp32 [T, K], counts int32 [E], aux fp32 scalar).

    logits      [T, E] fp32, bf16, fp16 or fp64; ties go to the lower expert id
    router      "topk_softmax": softmax over the selected logits (gpt-oss); "softmax_topk": softmax over all, then top-K; "softmax_topk_norm":
                renormalised (Qwen3-MoE); "sigmoid_topk", "sigmoid_topk_norm": scores sigmoid(logits) (DeepSeek-V3)
    router_bias [E], added to the scores for the choice alone (to the logits with "topk_softmax"); see update_router_bias
    groups, topk_groups  the experts stand in `groups` groups of equal size, a token chooses within its topk_groups best ones
    scale       factor of the weights
    z_loss      weight of mean_t logsumexp(logits_t)^2 in aux

    aux = E sum_e (counts_e / (T k)) mean_t p_te + z_loss ..., p = softmax(logits), with a sigmoid the scores over their sum: the load-balance loss.
    Differentiable: weights and aux, in logits. The first three routers without bias and groups are one kernel.
    """
    check_choice(router, "router", ROUTERS | dict.fromkeys(EXTRA_ROUTERS))
    if logits.dim() != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits is {tuple(logits.shape)} with k = {k}, expected [T, E] and 1 <= k <= E")
    check_score(logits, "logits")
    if router_bias is not None and (router_bias.shape != logits.shape[1:] or router_bias.device != logits.device):
        raise ValueError(
            f"router_bias is {tuple(router_bias.shape)} on {router_bias.device}, expected [E] = [{logits.shape[1]}] on {logits.device} as logits"
        )
    if router in ROUTERS and router_bias is None and groups == 1:
        ids, weights, counts, aux = Route.apply(logits.contiguous(), k, ROUTERS[router])
    else:
        ids, weights, counts, aux = scored_route(logits, k, router, router_bias, groups, topk_groups)
    if scale != 1.0:
        weights = weights * scale
    if z_loss:
        aux = aux + z_loss * router_z_loss(logits)
    return ids, weights, counts, aux


def layer(
    x, router_w, w1, w2, k, *, router="softmax_topk", router_bias=None, groups=1, topk_groups=1, scale=1.0, z_loss=0.0, activation="swiglu",
    w1_layout="concatenated", b1=None, b2=None, addend=None, recompute=False, alpha=1.702, limit=None,
):  # fmt: skip
    """Router and experts: (O [T, d], aux scalar).

    router_w  [E, d], used in the dtype of x: logits = x router_w^T
    k         experts per token; the other arguments are those of `route` and `experts`

    With the first three routers alone it is one autograd.Function: the backward sums dS inside the router's gradient and adds the router's dX in the
    experts' last kernel. Otherwise it is `route`, then `experts`.
    """
    tensors, options = layer_arguments(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit)
    rows = tensors[0]
    if router_w.shape != (w2.shape[0], rows.shape[1]):
        raise ValueError(f"router_w is {tuple(router_w.shape)}, expected [E, d] = [{w2.shape[0]}, {rows.shape[1]}]")
    check_device(rows, "x", router_w=router_w)
    if not 1 <= k <= router_w.shape[0]:
        raise ValueError(f"k is {k}, expected 1 .. E = {router_w.shape[0]}")
    router_w = router_w.to(rows.dtype)
    if router in ROUTERS and router_bias is None and groups == 1 and scale == 1.0 and not z_loss:
        return Layer.apply(*tensors, router_w, (k, ROUTERS[router], options, saves_h(recompute)))
    ids, weights, _, aux = route(
        rows @ router_w.t(), k, router=router, router_bias=router_bias, groups=groups, topk_groups=topk_groups, scale=scale,
        z_loss=z_loss,
    )  # fmt: skip
    out = experts(
        x, w1, w2, ids, weights, activation=activation, w1_layout=w1_layout, b1=b1, b2=b2, addend=addend, recompute=recompute, alpha=alpha,
        limit=limit,
    )  # fmt: skip
    return out, aux
