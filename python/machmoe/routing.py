"""Routings: which (token, expert) pairs are computed, with which scores, as one struct of fixed capacity."""

import dataclasses

import torch

from ._library import LISTS, accum_of, metadata_layout, ops
from .arguments import RULES, check_choice, check_device, check_index, check_score
from .autograd import once_differentiable


@dataclasses.dataclass(frozen=True)
class Routing:
    """Rows grouped by expert, ascending token inside one; the first sum(counts) of the R_cap rows are valid.

    token, expert  int32 [R_cap]: of each row
    score          fp32 (fp64) [R_cap]: of each row, differentiable in what the routing was made from
    counts         int32 [E]: rows of each expert; offsets int32 [E + 1]: their exclusive sum. Both live on the device.
    num_tokens     T: the length of the X that this routing is for
    rounded        False where token rounding fell back to plain top-K because T < tile
    metadata       the buffer that the kernels read
    """

    token: torch.Tensor
    expert: torch.Tensor
    score: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    num_tokens: int
    metadata: torch.Tensor
    rounded: bool = False

    @property
    def num_experts(self):
        return self.counts.shape[0]

    @property
    def capacity(self):
        """R_cap: the rows that every buffer of this routing holds."""
        return self.token.shape[0]

    @classmethod
    def from_topk(cls, ids, weights, num_experts):
        """From top-K ids [T, K] (int32 or int64; ids >= num_experts are dropped) and weights [T, K].

        Raises RuntimeError on the CPU for a negative id or an expert that a token names twice.
        """
        if ids.dim() != 2 or ids.shape != weights.shape:
            raise ValueError(f"ids has shape {tuple(ids.shape)} and weights {tuple(weights.shape)}, expected [T, K] both")
        tokens, k = ids.shape
        token_ids = torch.arange(tokens, device=ids.device, dtype=ids.dtype).repeat_interleave(k)
        return cls.from_lists(token_ids, ids.reshape(-1), weights.reshape(-1), tokens, num_experts)

    @classmethod
    def from_lists(cls, token_ids, expert_ids, scores, num_tokens, num_experts):
        """From triples (token, expert, score) in any order; token_ids, expert_ids int32 or int64 [R_cap], scores [R_cap].

        Pairs with expert >= num_experts are dropped. Raises RuntimeError on the CPU for ids out of range and for duplicate pairs.
        """
        if token_ids.dim() != 1 or not token_ids.shape == expert_ids.shape == scores.shape:
            shapes = (tuple(t.shape) for t in (token_ids, expert_ids, scores))
            raise ValueError("token_ids, expert_ids, scores have shapes {}, {}, {}, expected [R] all".format(*shapes))
        check_index(token_ids, "token_ids")
        check_index(expert_ids, "expert_ids")
        check_score(scores, "scores")
        check_device(token_ids, "token_ids", expert_ids=expert_ids, scores=scores)
        if token_ids.dtype != expert_ids.dtype:
            token_ids, expert_ids = token_ids.long(), expert_ids.long()
        scores = scores.to(accum_of(scores.dtype)).contiguous()
        score, metadata, expert = _ListScores.apply(scores, token_ids.contiguous(), expert_ids.contiguous(), num_tokens, num_experts)
        return _from_metadata(metadata, score, expert, num_tokens, num_experts)


def _views(metadata, num_tokens, num_experts, capacity, *, f64=False):
    layout, _ = metadata_layout(LISTS, num_tokens, num_experts, capacity, cuda=metadata.is_cuda, f64=f64)
    return {name: metadata[start : start + length] for name, (start, length) in layout.items()}


def _score_view(metadata, num_tokens, num_experts, capacity, *, f64=False):
    """The scores that the kernels read, without a copy."""
    return _views(metadata, num_tokens, num_experts, capacity, f64=f64)["score"].view(torch.float64 if f64 else torch.float32)


def _from_metadata(metadata, score, expert, num_tokens, num_experts, *, rounded=False):
    view = _views(metadata, num_tokens, num_experts, expert.shape[0], f64=score.dtype == torch.float64)
    return Routing(view["token"], expert, score, view["counts"], view["offsets"], num_tokens, metadata, rounded)


def _scattered(values, index, valid, length):
    """zeros(length) with values[i] at index[i] where valid[i]; the indices of valid values differ, so the bits do not depend on any order."""
    out = values.new_zeros(length + 1)
    return out.scatter_(0, torch.where(valid, index, length), values)[:length]


class _ListScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, token_ids, expert_ids, num_tokens, num_experts):
        metadata, expert, order = ops.routing_lists(token_ids, expert_ids, scores, num_tokens, num_experts)
        ctx.save_for_backward(order)
        ctx.mark_non_differentiable(metadata, expert)
        ctx.set_materialize_grads(False)  # of the metadata: no zeros
        return _score_view(metadata, num_tokens, num_experts, order.shape[0], f64=scores.dtype == torch.float64), metadata, expert

    @staticmethod
    @once_differentiable
    def backward(ctx, d_score, _d_metadata, _d_expert):
        if d_score is None:
            return None, None, None, None, None
        (order,) = ctx.saved_tensors
        return _scattered(d_score, order.long(), order >= 0, order.shape[0]), None, None, None, None


class _RoundedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, seed, k, tile, rule, renormalize):
        metadata, expert = ops.token_round(scores, k, tile, rule, renormalize, seed)
        ctx.save_for_backward(scores, metadata, expert)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(metadata, expert)
        ctx.set_materialize_grads(False)  # of the metadata: no zeros
        return _score_view(metadata, *scores.shape, expert.shape[0]), metadata, expert

    @staticmethod
    @once_differentiable
    def backward(ctx, d_score, _d_metadata, _d_expert):
        if d_score is None:
            return None, None, None, None, None, None
        d_scores = ops.token_round_backward(d_score.contiguous(), *ctx.saved_tensors, ctx.renormalize)
        return d_scores, None, None, None, None, None


def token_round(scores, k, tile=128, rule="nr_f", *, renormalize=False, seed=None):
    """Token rounding (arXiv 2512.14080, section 5): top-K routing whose rows per expert are multiples of `tile`.

    scores       fp32 [T, E] in [0, 1]: softmax or sigmoid of the router's logits; differentiable
    k            experts per token before rounding
    rule         "nr_f" nearest, "sr_f" stochastic by the remainder, "nr_s" stochastic by the scores, "up", "down", "balance_f" keeps the total
    renormalize  True: the scores of a token's kept pairs are divided by their sum
    seed         int for "sr_f" and "nr_s"; None draws one from torch's CPU generator

    Returns a Routing of fixed capacity. An expert whose rounding up would need more than T tokens rounds down; T < tile is plain top-K
    (Routing.rounded tells). Raises ValueError for wrong shapes, RuntimeError on the CPU for scores outside [0, 1].
    """
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores is {scores.dtype} {tuple(scores.shape)}, expected float32 [T, E]: pass softmax(logits.float())")
    check_choice(rule, "rule", RULES)
    if seed is not None and not (hasattr(seed, "__index__") and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}, expected an int of 64 bits")
    drawn = seed is None and rule in ("sr_f", "nr_s")
    seed = torch.randint(2**62, (), device="cpu") if drawn else torch.tensor(seed or 0, dtype=torch.int64, device="cpu")
    tokens, experts = scores.shape
    score, metadata, expert = _RoundedScores.apply(scores.contiguous(), seed, k, tile, RULES[rule], renormalize)
    return _from_metadata(metadata, score, expert, tokens, experts, rounded=tokens >= tile)
