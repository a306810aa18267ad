"""Routings: which (token, expert) pairs are computed, with which scores, as one struct of fixed capacity."""

import dataclasses

import torch

from ._library import LISTS, accum_of, metadata_layout, ops, rounded_capacity

RULES = {"nr_f": 0, "sr_f": 1, "nr_s": 2, "up": 3, "down": 4, "balance_f": 5}  # machmoe_rounding


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
        if token_ids.dtype != expert_ids.dtype:
            expert_ids = expert_ids.to(token_ids.dtype)
        f64 = scores.dtype == torch.float64
        metadata, order = ops.routing_lists(token_ids.contiguous(), expert_ids.contiguous(), num_tokens, num_experts, f64)
        rows = torch.where(order >= 0, scores.to(accum_of(scores.dtype))[order.clamp(min=0)], 0)
        return _from_metadata(metadata, rows, num_tokens, num_experts, order.shape[0], f64=f64)


def _from_metadata(metadata, score, num_tokens, num_experts, capacity, *, f64=False, rounded=False):
    layout, _ = metadata_layout(LISTS, num_tokens, num_experts, capacity, cuda=metadata.is_cuda, f64=f64, with_expert=True)
    view = {name: metadata[start : start + length] for name, (start, length) in layout.items()}
    if callable(score):
        score = score(view)
    return Routing(view["token"], view["expert"], score, view["counts"], view["offsets"], num_tokens, metadata, rounded)


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
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if seed is None:
        seed = int(torch.randint(2**62, ())) if rule in ("sr_f", "nr_s") else 0
    tokens, experts = scores.shape
    metadata = ops.token_round(scores.detach().contiguous(), k, tile, RULES[rule], renormalize, seed)
    capacity = rounded_capacity(tokens, experts, k, tile, RULES[rule])

    def gathered(view):
        valid = torch.arange(capacity, device=scores.device) < view["offsets"][-1]
        if tokens == 0:
            return scores.new_zeros(0)
        kept = torch.where(valid, scores[view["token"], view["expert"]], 0)
        if not renormalize:
            return kept
        sums = scores.new_zeros(tokens).index_add(0, view["token"], kept)[view["token"]]
        return kept / torch.where(sums > 0, sums, 1)

    return _from_metadata(metadata, gathered, tokens, experts, capacity, rounded=tokens >= tile)
