"""Routing, token_round and route: contents, gradients, errors."""

import dataclasses

import machmoe
import pytest
import torch
from machmoe import _library

T, E, K = 50, 7, 3


def topk(seed=0):
    torch.manual_seed(seed)
    return torch.rand(T, E).topk(K).indices, torch.rand(T, K, requires_grad=True)


def test_rows_are_grouped_by_expert_with_ascending_tokens():
    ids, weights = topk()
    ids[4, 1] = E  # dropped
    r = machmoe.Routing.from_topk(ids, weights, E)
    rows = int(r.counts.sum())
    assert rows == T * K - 1 and r.capacity == T * K and r.num_experts == E
    key = r.expert[:rows].long() * T + r.token[:rows]
    assert (key.diff() > 0).all()
    assert torch.equal(r.offsets[1:], r.counts.cumsum(0).int())
    for row in range(rows):
        slot = (ids[r.token[row]] == r.expert[row]).nonzero()
        assert r.score[row] == weights[r.token[row], slot]
    assert (r.score[rows:] == 0).all()


def test_lists_in_any_order_are_the_same_routing():
    ids, weights = topk()
    a = machmoe.Routing.from_topk(ids, weights, E)
    order = torch.randperm(T * K)
    tokens = torch.arange(T).repeat_interleave(K)
    b = machmoe.Routing.from_lists(tokens[order], ids.flatten()[order], weights.flatten()[order], T, E)
    for name in ("token", "expert", "score", "counts", "offsets"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_score_is_differentiable():
    ids, weights = topk()
    r = machmoe.Routing.from_topk(ids, weights, E)
    factor = torch.randn(r.capacity)
    (r.score * factor).sum().backward()
    for row in range(r.capacity):
        slot = (ids[r.token[row]] == r.expert[row]).nonzero()
        assert weights.grad[r.token[row], slot] == factor[row]


class Ignore(torch.autograd.Function):
    """Has no gradient for its input."""

    @staticmethod
    def forward(ctx, score):
        return score.sum()

    @staticmethod
    def backward(ctx, _):
        return None


def test_a_score_that_gets_no_gradient_passes_none_on():
    ids, weights = topk()
    tokens, scores = torch.arange(T).repeat_interleave(K), torch.rand(T, E, requires_grad=True)
    listed = machmoe.Routing.from_lists(tokens, ids.flatten(), weights.flatten(), T, E)
    for routing, leaf in ((listed, weights), (machmoe.token_round(scores, K, 8), scores)):
        assert torch.autograd.grad(Ignore.apply(routing.score), leaf, allow_unused=True) == (None,)


def test_experts_general_is_experts_on_topk_routings():
    ids, weights = topk()
    x, w1, w2 = torch.randn(T, 16), torch.randn(E, 16, 16), torch.randn(E, 16, 8)
    for t in (x, w1, w2):
        t.requires_grad_()

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), (x, w1, w2, weights))

    a = machmoe.experts(x, w1, w2, ids, weights)
    b = machmoe.experts_general(x, w1, w2, machmoe.Routing.from_topk(ids, weights, E))
    torch.testing.assert_close(a, b)
    for ga, gb in zip(gradients(a), gradients(b), strict=True):
        assert (ga - gb).norm() <= 1e-6 * gb.norm()


def test_a_token_may_have_no_expert_or_all_of_them():
    x, w1, w2 = torch.randn(3, 8), torch.randn(E, 16, 8), torch.randn(E, 8, 8)
    tokens, experts = torch.tensor([1] * E + [2]), torch.tensor([*range(E), 0])
    out = machmoe.experts_general(x, w1, w2, machmoe.Routing.from_lists(tokens, experts, torch.ones(E + 1), 3, E))
    h = torch.einsum("d,erd->er", x[1], w1)
    want = torch.einsum("en,edn->d", torch.nn.functional.silu(h[:, :8]) * h[:, 8:], w2)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["nr_f", "sr_f", "nr_s", "up", "down", "balance_f"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_token_rounding_and_its_gradient_are_those_of_the_kept_pairs_in_fp64(rule, renormalize):
    torch.manual_seed(0)
    scores = torch.rand(40, 5).mul(0.9)
    scores[7:10] = 0  # nothing to divide by
    r = machmoe.token_round(scores.requires_grad_(), 2, 8, rule, renormalize=renormalize, seed=3)
    assert r.rounded and (r.counts % 8 == 0).all() and int(r.offsets[-1]) == int(r.counts.sum())
    rows = int(r.offsets[-1])
    pairs = r.token[:rows].long(), r.expert[:rows].long()
    dense = scores.detach().double().requires_grad_()
    kept = torch.zeros(40, 5, dtype=torch.bool)
    kept[pairs] = True
    total = (dense * kept).sum(1, keepdim=True)
    want = (dense / torch.where(total > 0, total, 1) if renormalize else dense)[pairs]
    torch.testing.assert_close(r.score[:rows].double(), want, rtol=1e-6, atol=0)
    factor = torch.randn(r.capacity)
    (ours,) = torch.autograd.grad((r.score * factor).sum(), scores)
    (theirs,) = torch.autograd.grad((want * factor[:rows]).sum(), dense)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert (ours[~kept] == 0).all()


def test_fewer_tokens_than_a_tile_are_plain_topk():
    r = machmoe.token_round(torch.rand(20, 4), 2, 128)
    assert not r.rounded and int(r.counts.sum()) == 40


def test_metadata_layout_mirrors_the_library():
    for tokens, capacity, f64 in ((0, 0, False), (5, 9, True), (1000, 3000, False)):
        scores = torch.ones(capacity, dtype=torch.float64 if f64 else torch.float32)
        for kind in (_library.TOPK, _library.LISTS):
            ids = torch.zeros(capacity, dtype=torch.int64)
            _, size = _library.metadata_layout(kind, tokens, 3000, capacity, cuda=False, f64=f64)
            if kind == _library.LISTS:
                metadata, _, _ = _library.ops.routing_lists(ids, ids + 3000, scores, tokens, 3000)
            else:
                x, w1, w2 = (torch.zeros(s, dtype=scores.dtype) for s in ((capacity, 8), (3000, 16, 8), (3000, 8, 8)))
                layer = x, w1, None, w2, None, None, None, None
                _, _, metadata = _library.ops.topk_experts_forward(*layer, ids[:, None] + 3000, scores[:, None], 0, 1.702, 0.0, False, False)
                _, size = _library.metadata_layout(kind, capacity, 3000, capacity, cuda=False, f64=f64)
            assert metadata.numel() == size


def reference_route(logits, router):
    logits = logits.double()
    p = logits.softmax(-1)
    ids = logits.topk(K).indices
    weights = logits.gather(1, ids).softmax(-1) if router != "softmax_topk" else p.gather(1, ids)
    counts = torch.bincount(ids.flatten(), minlength=E)
    return ids, weights, counts, E * (counts / (T * K) * p.mean(0)).sum()


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "softmax_topk_norm"])
def test_route_is_its_definition(router):
    torch.manual_seed(0)
    logits = torch.randn(T, E, requires_grad=True)
    ids, weights, counts, aux = machmoe.route(logits, K, router=router)
    want = reference_route(logits, router)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), want[0]) and torch.equal(counts.long(), want[2])
    torch.testing.assert_close(weights.double(), want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux.double(), want[3], rtol=1e-5, atol=1e-6)
    factor = torch.randn(T, K)
    (a,) = torch.autograd.grad((weights * factor).sum() + 2 * aux, logits)
    (b,) = torch.autograd.grad((want[1] * factor).sum() + 2 * want[3], logits)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ids_of_two_types_keep_their_values():
    """An id beyond int32 is dropped as one of E is, not taken for its lower half."""
    experts = torch.tensor([2**32, 1, 2**33 + 2])
    routing = machmoe.Routing.from_lists(torch.arange(3, dtype=torch.int32), experts, torch.ones(3), 3, 4)
    assert routing.counts.tolist() == [0, 1, 0, 0]


def test_errors_name_the_argument():
    ids, weights = topk()
    with pytest.raises(ValueError, match="seed is 1.7, expected an int of 64 bits"):
        machmoe.token_round(torch.rand(4, 4), 2, rule="sr_f", seed=1.7)
    with pytest.raises(ValueError, match=r"k is -1, expected 1 .. E = 4"):
        machmoe.layer(torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 8), -1)
    with pytest.raises(ValueError, match=r"expected \[T, K\] both"):
        machmoe.Routing.from_topk(ids[0], weights, E)
    with pytest.raises(RuntimeError, match="occurs twice"):
        machmoe.Routing.from_lists(torch.tensor([1, 1]), torch.tensor([2, 2]), torch.ones(2), T, E)
    with pytest.raises(ValueError, match="rule is 'nearest'"):
        machmoe.token_round(torch.rand(4, 4), 2, rule="nearest")
    with pytest.raises(RuntimeError, match=r"scores\[\d, \d\] is 2"):
        machmoe.token_round(torch.full((4, 4), 2.0), 2)
    with pytest.raises(ValueError, match="router is 'sigmoid'"):
        machmoe.route(torch.randn(4, 4), 2, router="sigmoid")
    r = machmoe.Routing.from_topk(ids, weights, E)
    with pytest.raises(ValueError, match="routing is for 50 tokens and 7 experts, expected T = 49"):
        machmoe.experts_general(torch.randn(49, 8), torch.randn(E, 16, 8), torch.randn(E, 8, 8), r)
    tensors = torch.randn(T, 8), torch.randn(E, 16, 8), torch.randn(E, 8, 8)
    for score, kind in ((r.score[:90], tensors), (r.score.double(), [t.double() for t in tensors])):
        with pytest.raises(RuntimeError, match="keep a routing with the score that it was made with"):
            machmoe.experts_general(*kind, dataclasses.replace(r, score=score))


def test_gradients_of_one_result_alone_are_those_beside_zeros_for_the_other():
    torch.manual_seed(7)
    T, d, n, E, K = 40, 16, 8, 6, 2
    sizes = {"x": (T, d), "router_w": (E, d), "w1": (E, 2 * n, d), "w2": (E, d, n)}
    leaves = {name: torch.randn(size, dtype=torch.float64, requires_grad=True) for name, size in sizes.items()}

    def gradients(pick):
        return torch.autograd.grad(pick(*machmoe.layer(**leaves, k=K)), leaves.values(), allow_unused=True)

    for alone, beside in (
        (lambda o, aux: o.square().sum(), lambda o, aux: o.square().sum() + 0 * aux),
        (lambda o, aux: aux, lambda o, aux: aux + 0 * o.sum()),
    ):
        for a, b in zip(gradients(alone), gradients(beside), strict=True):
            torch.testing.assert_close(a, b)

    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    ids, weights, _, aux = machmoe.route(logits, K)
    for alone, beside in ((weights.square().sum(), weights.square().sum() + 0 * aux), (aux, aux + 0 * weights.sum())):
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (alone, beside)))
