"""Routers beyond the fused ones: sigmoid scores, selection bias, groups, scale, z-loss, jitter; in route, layer and MoE."""

import machmoe
import pytest
import torch

T, E, K, D, N = 12, 8, 3, 16, 8
ROUTERS = ["topk_softmax", "softmax_topk", "softmax_topk_norm", "sigmoid_topk", "sigmoid_topk_norm"]


def logits(seed=0, dtype=torch.float64):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def by_hand(row, k, router, bias, groups, topk_groups, scale):
    """One token, one number at a time."""
    row = row.tolist()
    total = sum(torch.tensor(row).exp().tolist())
    score = [1 / (1 + 2.718281828459045**-x) if "sigmoid" in router else 2.718281828459045**x / total for x in row]
    ranked = row if router == "topk_softmax" else score
    choice = [r + b for r, b in zip(ranked, bias, strict=True)]
    size = E // groups
    strength = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-strength[g], g))[:topk_groups]
    ids = sorted((e for e in range(E) if e // size in best), key=lambda e: (-choice[e], e))[:k]
    weights = [ranked[e] for e in ids]
    if router == "topk_softmax":
        weights = torch.tensor(weights, dtype=torch.float64).softmax(0).tolist()
    elif router.endswith("_norm"):
        weights = [w / sum(weights) for w in weights]
    return ids, [scale * w for w in weights]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("groups", "topk_groups"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_choice_and_the_weights_are_their_definition(router, groups, topk_groups, biased):
    x, bias = logits(), torch.linspace(-0.3, 0.3, E, dtype=torch.float64)
    options = {"router": router, "router_bias": bias if biased else None, "groups": groups, "topk_groups": topk_groups, "scale": 2.5}
    ids, weights, counts, _ = machmoe.route(x, K, **options)
    for t in range(T):
        want_ids, want_weights = by_hand(x[t], K, router, bias.tolist() if biased else [0] * E, groups, topk_groups, 2.5)
        assert ids[t].tolist() == want_ids
        torch.testing.assert_close(weights[t], torch.tensor(want_weights, dtype=torch.float64))
    assert ids.dtype == counts.dtype == torch.int32
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_general_path_is_the_fused_one_where_both_exist(router):
    x = logits(1, torch.float32)
    general = machmoe.route(x, K, router=router, router_bias=torch.zeros(E))
    if "sigmoid" in router:
        prob = x.sigmoid() / x.sigmoid().sum(-1, keepdim=True)
        torch.testing.assert_close(general[3], E * (general[2] / (T * K) * prob.mean(0)).sum())
        return
    for ours, theirs in zip(general, machmoe.route(x, K, router=router), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ties_go_to_the_lower_expert():
    ids = machmoe.route(torch.zeros(2, E), K, router="sigmoid_topk", groups=4, topk_groups=2)[0]
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_weights_and_losses(router):
    bias = torch.linspace(-0.3, 0.3, E, dtype=torch.float64)

    def run(x):
        _, weights, _, aux = machmoe.route(x, K, router=router, router_bias=bias, groups=2, topk_groups=2, scale=1.5, z_loss=0.1)
        return weights, aux

    assert torch.autograd.gradcheck(run, logits(2))


def test_the_z_loss_is_added_to_aux():
    x = logits(3)
    plain, with_z = (machmoe.route(x, K, z_loss=z)[3] for z in (0.0, 0.5))
    torch.testing.assert_close(with_z - plain, 0.5 * x.logsumexp(-1).square().mean())


def leaves():
    torch.manual_seed(4)
    shapes = {"x": (T, D), "router": (E, D), "w1": (E, 2 * N, D), "w2": (E, D, N)}
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def test_layer_is_route_and_experts():
    v, options = leaves(), {"router": "sigmoid_topk_norm", "groups": 4, "topk_groups": 2, "scale": 2.5, "z_loss": 0.01}
    out, aux = machmoe.layer(v["x"], v["router"], v["w1"], v["w2"], K, router_bias=torch.linspace(0, 0.2, E), **options)
    ids, weights, _, want_aux = machmoe.route(v["x"] @ v["router"].t(), K, router_bias=torch.linspace(0, 0.2, E), **options)
    want = machmoe.experts(v["x"], v["w1"], v["w2"], ids, weights)
    assert torch.equal(out, want) and torch.equal(aux, want_aux)
    ours = torch.autograd.grad(out.sum() + aux, tuple(v.values()))
    theirs = torch.autograd.grad(want.sum() + want_aux, tuple(v.values()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_layer_compiles_in_one_graph():
    v = leaves()

    def run(x, router, w1, w2):
        return machmoe.layer(x, router, w1, w2, K, router="sigmoid_topk_norm", groups=4, topk_groups=2, scale=2.5)

    for ours, theirs in zip(torch.compile(run, fullgraph=True)(*v.values()), run(*v.values()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_bias_moves_towards_equal_counts():
    bias = torch.zeros(4)
    machmoe.update_router_bias(bias, torch.tensor([10, 0, 5, 5]), rate=0.01)
    torch.testing.assert_close(bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_a_layer_with_bias_balances_its_experts():
    torch.manual_seed(5)
    moe = machmoe.MoE(D, N, E, 2, router="sigmoid_topk_norm", router_bias=True)
    x = torch.randn(512, D) + 0.5
    assert "gate.e_score_correction_bias" in moe.state_dict()
    spread = []
    for _ in range(200):
        moe(x)
        spread.append(moe.expert_counts.float().std().item())
        moe.update_bias(0.01)
    assert sum(spread[-5:]) < 0.3 * sum(spread[:5])
    assert moe.router_bias.requires_grad is False


def test_the_bias_moves_by_the_counts_of_all_ranks(monkeypatch):
    moe = machmoe.MoE(D, N, E, 2, router="sigmoid_topk_norm", router_bias=True)
    moe(torch.randn(512, D))
    own, others = moe.expert_counts.clone(), torch.arange(E, dtype=torch.int32) * 1000
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group: counts.add_(others) if group == "ranks" else None)
    moe.update_bias(0.01, group="ranks")
    assert torch.equal(moe.router_bias, machmoe.update_router_bias(torch.zeros(E), own + others, 0.01)) and torch.equal(moe.expert_counts, own)


def test_the_bias_stays_fp32_when_the_layer_is_cast():
    moe = machmoe.MoE(D, N, E, 2, router="sigmoid_topk_norm", router_bias=True)
    moe.router_bias.fill_(0.5001)
    wrapped = torch.nn.Sequential(moe).to(torch.bfloat16)
    assert moe.gate.weight.dtype == torch.bfloat16 and moe.router_bias.dtype == torch.float32
    assert (wrapped[0].router_bias == torch.tensor(0.5001)).all()
    wrapped(torch.randn(64, D, dtype=torch.bfloat16))
    moe.update_bias()
    assert (moe.router_bias - 0.5001).abs().max() > 0.0009
    on_meta = machmoe.MoE(D, N, E, 2, router_bias=True, device="meta", dtype=torch.bfloat16)
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta.router_bias.dtype == torch.float32 and not on_meta.router_bias.any()


def test_jitter_disturbs_the_router_in_training_alone():
    torch.manual_seed(6)
    moe, x = machmoe.MoE(D, N, E, 2, router="softmax_topk", jitter=0.3), torch.randn(64, D)
    assert not torch.equal(moe(x), moe(x))
    moe.eval()
    assert torch.equal(moe(x), moe(x))


@pytest.mark.parametrize("router", ["softmax_topk_norm", "sigmoid_topk"])
def test_token_rounding_ranks_by_the_scores_of_the_router(router):
    moe = machmoe.MoE(D, N, 4, 2, router=router, routing="token-rounding", tile=16)
    out = moe(torch.randn(128, D))
    assert out.shape == (128, D) and moe.expert_counts.sum() == 256


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="groups is 3 and topk_groups 1, expected groups to divide E = 8"):
        machmoe.route(logits(), K, groups=3)
    with pytest.raises(ValueError, match=r"router_bias is \(3,\) on cpu, expected \[E\] = \[8\]"):
        machmoe.route(logits(), K, router_bias=torch.zeros(3))
    with pytest.raises(ValueError, match="expected router_bias False, groups 1 and scale 1.0"):
        machmoe.MoE(D, N, E, 2, routing="token-rounding", scale=2.0)
    with pytest.raises(ValueError, match="k is 9, expected 1 .. E = 8"):
        machmoe.MoE(D, N, E, 9)
    with pytest.raises(RuntimeError, match="update_bias needs a layer with router_bias=True"):
        machmoe.MoE(D, N, E, 2).update_bias()
