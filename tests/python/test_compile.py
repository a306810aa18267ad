"""torch.compile: one graph, no recompilation for a new number of tokens, the numbers of eager mode; and opcheck for every operator."""

import machmoe
import pytest
import torch
from torch._dynamo.utils import counters

ops = torch.ops.machmoe
D, N, E, K = 16, 24, 5, 2


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def weights():
    torch.manual_seed(0)
    return [torch.randn(s).div(4).requires_grad_() for s in ((E, 2 * N, D), (E, D, N), (E, D))]


def experts(x, w1, w2, _):
    ids = torch.arange(x.shape[0])[:, None].add(torch.arange(K)).remainder(E)
    return machmoe.experts(x, w1, w2, ids, x[:, :K].sigmoid(), b2=w2[:, :, 0])


def experts_recompute(x, w1, w2, _):
    ids = torch.arange(x.shape[0])[:, None].add(torch.arange(K)).remainder(E)
    return machmoe.experts(x, w1, w2, ids, x[:, :K].sigmoid().bfloat16(), recompute=True, addend=x)


def lists(x, w1, w2, _):
    tokens = torch.arange(x.shape[0] - 3).flip(0)
    routing = machmoe.Routing.from_lists(tokens, tokens % E, x[tokens, 0].sigmoid(), x.shape[0], E)
    return machmoe.experts_general(x, w1, w2, routing)


def rounded(rule):
    def run(x, w1, w2, router):
        routing = machmoe.token_round((x @ router.T).softmax(-1), K, 8, rule, renormalize=True, seed=5)
        return machmoe.experts_general(x, w1, w2, routing)

    return run


def grouped(x, w1, w2, _):
    counts = torch.tensor([3, 0, 7, 2, 1])
    return machmoe.grouped_mlp(x, counts, w1, w2, row_scores=x[:, 0])


def layer(x, w1, w2, router):
    out, aux = machmoe.layer(x, router, w1, w2, K)
    return out + aux


FUNCTIONS = {
    "experts": experts, "recompute": experts_recompute, "lists": lists, "token_round nr_f": rounded("nr_f"),
    "token_round sr_f": rounded("sr_f"), "grouped_mlp": grouped, "layer": layer,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_serves_every_number_of_tokens(name):
    function, parameters = FUNCTIONS[name], weights()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (33, 40, 57, 64):
        x = torch.randn(tokens, D)
        results = []
        for run in (compiled, function):
            leaf = x.clone().requires_grad_()
            out = run(leaf, *parameters)
            results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *parameters), allow_unused=True)))
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_module_becomes_dynamic_by_itself():
    """Without dynamic=True torch compiles for the first T, once more with T symbolic, and never again."""
    moe = machmoe.MoE(D, N, E, K, shared_intermediate_size=8)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (33, 40, 57, 64, 100):
        x = torch.randn(tokens, D)
        torch.testing.assert_close(compiled(x), moe(x))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("rule", ["nr_f", "nr_s"])
def test_a_compiled_module_rounds_tokens(rule):
    """The seed of a stochastic rule is drawn in the graph, from torch's generator: the draws of eager mode, another one at each call."""
    moe = machmoe.MoE(D, N, E, K, routing="token-rounding", tile=8, rule=rule)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (33, 40):
        x = torch.randn(tokens, D)
        draws = []
        for run in (compiled, moe):
            torch.manual_seed(7)
            draws.append([run(x) for _ in range(6)])
        for a, b in zip(*draws, strict=True):
            torch.testing.assert_close(a, b)
        assert all(torch.equal(draws[0][0], other) for other in draws[0]) == (rule == "nr_f")


def test_opcheck_of_every_operator():
    torch.manual_seed(0)
    t, d, n, e, k = 6, 16, 8, 4, 2
    x, w1, w2, d_o = torch.randn(t, d), torch.randn(e, 2 * n, d), torch.randn(e, d, n), torch.randn(t, d)
    gate, up, b, b2 = *w1.chunk(2, 1), torch.randn(e, n), torch.randn(e, d)
    ids, scores = torch.rand(t, e).topk(k).indices, torch.rand(t, k)
    logits, router_w = torch.randn(t, e), torch.randn(e, d)
    counts = torch.tensor([1, 2, 0, 3], dtype=torch.int32)  # all rows: H is not written past them
    rows = ops.routing_rows(counts, x)
    rounded = ops.token_round(logits.softmax(-1), k, 2, 0, True, torch.tensor(0))
    lists, _, _ = ops.routing_lists(torch.arange(t), ids[:, 0].contiguous(), scores[:, 0].contiguous(), t, e)
    one, pair = (x, w1, None, w2, None, None, None), (x, gate, up, w2, b, b, b2)
    swiglu = (0, 1.702, 0.0, False)
    _, h, metadata = ops.topk_experts_forward(*one, None, ids, scores, *swiglu, True)
    topk = (metadata, None, scores, 0, k)
    rids, rweights, rcounts, aux = ops.route_forward(logits, k, 0)
    _, _, rmetadata = ops.topk_experts_forward(*one, None, rids, rweights, *swiglu, False)
    routed = rmetadata, logits, rids, rweights, rcounts, 0
    calls = [
        (ops.routing_lists, (torch.arange(t), ids[:, 0].contiguous(), scores[:, 0].contiguous(), t, e)),
        (ops.routing_rows, (counts, x)),
        (ops.token_round, (logits.softmax(-1), k, 2, 0, False, torch.tensor(0))),
        (ops.token_round_backward, (torch.randn(rounded[1].shape), logits.softmax(-1), *rounded, True)),
        (ops.route_forward, (logits, k, 0)),
        (ops.route_backward, (scores, aux, logits, rids, rweights, rcounts, 0)),
        (ops.topk_experts_forward, (*one, None, ids, scores, *swiglu, True)),
        (ops.topk_experts_forward, (*pair, x, ids.int(), scores, *swiglu, False)),
        (ops.experts_forward, (*one, None, lists, None, scores[:, 0].contiguous(), 1, *swiglu, True)),
        (ops.experts_forward, (*pair, x, lists, None, scores[:, 0].contiguous(), 1, *swiglu, False)),
        (ops.experts_forward, (*one, None, rows, counts, None, 2, *swiglu, True)),
        (ops.experts_backward, (d_o, *one, h, *topk, *swiglu, True, True, True, False, False, 0)),
        (ops.experts_backward_, (d_o, *pair, h.clone(), *topk, *swiglu, False, True, False, True, True, -1)),
        (ops.layer_backward_, (d_o, None, x, router_w, *one[1:], h.clone(), *routed, *swiglu, True, True, False, False)),
        (ops.layer_backward, (d_o, aux, x, router_w, *pair[1:], None, *routed, *swiglu, True, False, True, True)),
    ]
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("machmoe::")}
    assert {op for op, _ in calls} == {getattr(ops, name) for name in registered - {"build_info", "device_reason"}}
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls:
        # Metadata has gaps between its arrays, whatever was in memory: the last test would compare them.
        is_metadata = op in (ops.topk_experts_forward, ops.routing_lists, ops.routing_rows, ops.token_round)
        torch.library.opcheck(op.default, args, test_utils=every[: 3 if is_metadata else 4])


def test_meta_tensors_have_the_shapes_of_real_ones():
    with torch.device("meta"):
        moe = machmoe.MoE(D, N, E, K, shared_intermediate_size=8, bias=True, dtype=torch.bfloat16)
        out = moe(torch.empty(3, 7, D, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.shape == (3, 7, D) and all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in moe.parameters())
