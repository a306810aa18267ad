"""Routers beyond the fused ones: sigmoid scores, a selection bias, group-limited choice, scaled weights, the z-loss. In torch operations, so that
they run wherever torch does and autograd differentiates them; the fused top-K routers are operators of the library."""

import torch

from ._library import accum_of

EXTRA_ROUTERS = ("sigmoid_topk", "sigmoid_topk_norm")
SMALLEST_SUM = 1e-20  # beside the sum that renormalises, as DeepSeek-V3


def check_groups(num_experts, k, groups, topk_groups):
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}, expected 1 .. E = {num_experts}")
    if not (1 <= topk_groups <= groups and num_experts % groups == 0 and topk_groups * (num_experts // groups) >= k):
        raise ValueError(
            f"groups is {groups} and topk_groups {topk_groups}, "
            f"expected groups to divide E = {num_experts} and topk_groups of them to hold k = {k} experts"
        )


def _within_groups(choice, groups, topk_groups):
    """-inf outside the best groups; a group counts by the sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    tokens, num_experts = choice.shape
    grouped = choice.view(tokens, groups, num_experts // groups)
    strength = grouped.topk(min(2, num_experts // groups), dim=-1).values.sum(-1)
    best = strength.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    outside = torch.ones_like(strength, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).view(tokens, num_experts)


def scored_route(logits, k, router, router_bias, groups, topk_groups):
    """(ids int32 [T, k], weights accum [T, k], counts int32 [E], aux accum scalar) of any router; ties go to the lower id."""
    tokens, num_experts = logits.shape
    check_groups(num_experts, k, groups, topk_groups)
    logits = logits.to(accum_of(logits.dtype))
    sigmoid = router in EXTRA_ROUTERS
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ranked = logits if router == "topk_softmax" else scores
    choice = ranked.detach()
    if router_bias is not None:
        choice = choice + router_bias.to(choice.dtype)
    if groups > 1:
        choice = _within_groups(choice, groups, topk_groups)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = ranked.gather(1, ids)
    if router == "topk_softmax":
        weights = weights.softmax(-1)
    elif router.endswith("_norm"):
        weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device).scatter_add(
        0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32)
    )
    probability = scores / (scores.sum(-1, keepdim=True) + SMALLEST_SUM) if sigmoid else scores
    load = counts.to(logits.dtype) / max(tokens * k, 1)
    aux = num_experts * (load * probability.sum(0)).sum() / max(tokens, 1)
    return ids.int(), weights, counts, aux


def router_z_loss(logits):
    """mean_t logsumexp(logits_t)^2: keeps the logits small (ST-MoE, arXiv 2202.08906, section 3.2). 0 without tokens."""
    return logits.to(accum_of(logits.dtype)).logsumexp(-1).square().sum() / max(logits.shape[0], 1)


@torch.no_grad()
def update_router_bias(bias, counts, rate=1e-3):
    """In place: bias [E] += rate sign(mean(counts) - counts), the balance without an auxiliary loss of DeepSeek-V3 (arXiv 2408.15664).

    counts [E]: tokens of each expert since the last update; with data parallelism their sum over all ranks.
    """
    counts = counts.to(bias.dtype)
    return bias.add_(torch.sign(counts.mean() - counts), alpha=rate)
