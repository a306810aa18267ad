"""The CUDA backend against the CPU backend: equal bits for routings, the numerics contract for the rest. Runs on a Hopper GPU."""

import math
import threading

import machmoe
import pytest
import torch
from machmoe._library import TOPK, metadata_layout

CUDA = torch.device("cuda")
FIELDS = ("token", "expert", "score", "counts", "offsets")
TOLERANCE = 5e-3


def routing_pair(tokens, experts, scores, T, E):
    on_cpu = machmoe.Routing.from_lists(tokens, experts, scores, T, E)
    on_gpu = machmoe.Routing.from_lists(tokens.to(CUDA), experts.to(CUDA), scores.to(CUDA), T, E)
    return on_cpu, on_gpu


def expect_equal_routings(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name


def error(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item() if b.norm() > 0 else a.abs().max().item() if a.numel() else 0.0


@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (1000, 7, 3), (5000, 128, 8), (3000, 512, 10), (700, 4096, 2), (20000, 3, 1)])
def test_lists_in_any_order_are_the_routing_of_the_cpu(T, E, K):
    torch.manual_seed(T)
    ids = torch.rand(T, E).topk(K).indices
    ids[torch.rand(T, K) < 0.1] = E + 3  # dropped
    order = torch.randperm(T * K)
    tokens = torch.arange(T).repeat_interleave(K)
    expect_equal_routings(*routing_pair(tokens[order], ids.flatten()[order], torch.rand(T * K), T, E))


@pytest.mark.parametrize("rule", ["nr_f", "sr_f", "nr_s", "up", "down", "balance_f"])
@pytest.mark.parametrize(
    ("T", "E", "K", "tile"),
    [(3000, 16, 4, 128), (100, 8, 2, 128), (1024, 300, 8, 32), (5000, 64, 3, 1), (0, 4, 1, 8), (6000, 5, 5, 128), (2000, 200, 8, 64)],
)
def test_token_rounding_gives_the_bits_of_the_cpu(rule, T, E, K, tile):
    torch.manual_seed(1)
    for scores in (torch.randn(T, E).softmax(-1), torch.randint(3, (T, E)).float() / 4):
        for renormalize in (False, True):
            x, y = scores.clone().requires_grad_(), scores.to(CUDA).requires_grad_()
            a = machmoe.token_round(x, K, tile, rule, renormalize=renormalize, seed=5)
            b = machmoe.token_round(y, K, tile, rule, renormalize=renormalize, seed=5)
            for name in ("token", "expert", "counts", "offsets"):
                assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
            assert torch.equal(a.score, b.score.cpu())
            ds = torch.randn(a.capacity)
            (ours,), (theirs,) = torch.autograd.grad(a.score, x, ds), torch.autograd.grad(b.score, y, ds.to(CUDA))
            assert error(theirs, ours) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "softmax_topk_norm"])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (999, 7, 7), (3000, 128, 8), (2000, 512, 10), (300, 4096, 128)])
def test_the_router_selects_as_the_cpu_does(T, E, K, router, dtype):
    torch.manual_seed(2)
    logits = torch.randn(T, E).to(dtype)
    a, b = logits.clone().requires_grad_(), logits.to(CUDA).requires_grad_()
    ours, theirs = machmoe.route(a, K, router=router), machmoe.route(b, K, router=router)
    assert torch.equal(ours[0], theirs[0].cpu()) and torch.equal(ours[2], theirs[2].cpu())
    assert error(theirs[1], ours[1]) < 1e-5 and error(theirs[3], ours[3]) < 1e-4
    factor = torch.randn(T, K)
    ((ours[1] * factor).sum() + ours[3]).backward()
    ((theirs[1] * factor.to(CUDA)).sum() + theirs[3]).backward()
    assert error(b.grad, a.grad) < (1e-4 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "softmax_topk_norm", "sigmoid_topk", "sigmoid_topk_norm"])
@pytest.mark.parametrize(
    ("T", "E", "K", "groups", "topk_groups"), [(0, 8, 2, 4, 2), (1, 4, 2, 2, 1), (999, 64, 6, 8, 3), (2000, 256, 8, 8, 4), (300, 160, 8, 1, 1)]
)
def test_bias_groups_scale_and_z_loss_are_those_of_the_cpu(T, E, K, groups, topk_groups, router):
    """In fp64: an fp32 sigmoid may differ by its last bit between the devices, and a near tie would then be broken otherwise."""
    torch.manual_seed(4)
    logits, bias = torch.randn(T, E, dtype=torch.float64), torch.randn(E, dtype=torch.float64) / 8
    a, b = logits.clone().requires_grad_(), logits.to(CUDA).requires_grad_()
    options = {"router": router, "groups": groups, "topk_groups": topk_groups, "scale": 2.5, "z_loss": 0.1}
    ours, theirs = machmoe.route(a, K, router_bias=bias, **options), machmoe.route(b, K, router_bias=bias.to(CUDA), **options)
    assert torch.equal(ours[0], theirs[0].cpu()) and torch.equal(ours[2], theirs[2].cpu())
    assert error(theirs[1], ours[1]) < 1e-12 and error(theirs[3], ours[3]) < 1e-12
    factor = torch.randn(T, K, dtype=torch.float64)
    ((ours[1] * factor).sum() + ours[3]).backward()
    ((theirs[1] * factor.to(CUDA)).sum() + theirs[3]).backward()
    assert error(b.grad, a.grad) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_of_scores_and_groups_go_to_the_lower_id(dtype):
    logits = torch.zeros(40, 16, device=CUDA, dtype=dtype)
    ids = machmoe.route(logits, 5, router="sigmoid_topk_norm", router_bias=torch.zeros(16, device=CUDA), groups=4, topk_groups=2)[0]
    assert torch.equal(ids.cpu(), torch.arange(5, dtype=torch.int32).expand(40, 5))


def leaves(T, d, n, E, K, gated=True, bias=False):
    torch.manual_seed(3)
    v = {
        "x": torch.randn(T, d),
        "w1": torch.randn(E, (2 if gated else 1) * n, d) / math.sqrt(d),
        "w2": torch.randn(E, d, n) / math.sqrt(n),
        "weights": torch.rand(T, K),
    }
    if bias:
        v |= {"b1": torch.randn(E, (2 if gated else 1) * n), "b2": torch.randn(E, d)}
    return {name: (t if name == "weights" else t.bfloat16()).requires_grad_() for name, t in v.items()}


def on_gpu(v):
    return {name: t.detach().to(CUDA).requires_grad_() for name, t in v.items()}


def in_fp64(v):
    return {name: t.detach().double().requires_grad_() for name, t in v.items()}


def expect_contract(v, g, run):
    """run(leaves) -> O on the GPU in bf16 against the CPU's fp64 specification."""
    ref = in_fp64(v)
    out, want = run(g), run(ref)
    d_o = torch.randn(want.shape).bfloat16()
    out.backward(d_o.to(CUDA))
    want.backward(d_o.double())
    assert error(out, want) <= TOLERANCE
    for name in v:
        assert error(g[name].grad, ref[name].grad) <= TOLERANCE, name


ACTIVATIONS = ["swiglu", "swiglu_oai", "geglu", "reglu", "relu2", "relu", "gelu", "gelu_erf", "silu"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation, bias):
    v = leaves(300, 136, 72, 5, 2, gated=ACTIVATIONS.index(activation) < 4, bias=bias)
    ids = torch.rand(300, 5).topk(2).indices
    expect_contract(v, on_gpu(v), lambda t: machmoe.experts(
        t["x"], t["w1"], t["w2"], ids.to(t["x"].device), t["weights"], activation=activation, b1=t.get("b1"), b2=t.get("b2")))  # fmt: skip


@pytest.mark.parametrize(
    ("T", "d", "n", "E", "K"),
    [
        (0, 64, 64, 4, 2),
        (1, 8, 8, 1, 1),
        (385, 104, 8, 4, 1),
        (513, 8, 104, 9, 3),
        (700, 256, 128, 64, 8),
        (1000, 512, 256, 32, 4),
        (257, 1024, 512, 8, 2),
    ],
)
def test_shapes(T, d, n, E, K):
    v = leaves(T, d, n, E, K)
    ids = torch.rand(T, E).topk(K).indices
    ids[::5, -1] = E  # dropped
    expect_contract(v, on_gpu(v), lambda t: machmoe.experts(t["x"], t["w1"], t["w2"], ids.to(t["x"].device), t["weights"]))


def test_all_tokens_to_one_expert():
    v = leaves(1000, 128, 64, 6, 1)
    ids = torch.full((1000, 1), 4)
    expect_contract(v, on_gpu(v), lambda t: machmoe.experts(t["x"], t["w1"], t["w2"], ids.to(t["x"].device), t["weights"]))


def test_general_and_rounded_routings():
    v = leaves(600, 128, 64, 6, 2)
    ids = torch.rand(600, 6).topk(2).indices
    expect_contract(v, on_gpu(v), lambda t: machmoe.experts_general(
        t["x"], t["w1"], t["w2"], machmoe.Routing.from_topk(ids.to(t["x"].device), t["weights"], 6)))  # fmt: skip
    x, w1, w2, scores = v["x"].detach(), v["w1"].detach(), v["w2"].detach(), torch.randn(600, 6).softmax(-1)
    cpu = machmoe.experts_general(x, w1, w2, machmoe.token_round(scores, 2))
    gpu = machmoe.experts_general(x.to(CUDA), w1.to(CUDA), w2.to(CUDA), machmoe.token_round(scores.to(CUDA), 2))
    assert error(gpu, cpu) <= TOLERANCE


def test_dispatched_rows():
    v = leaves(700, 128, 64, 6, 2, bias=True)
    v["weights"] = torch.rand(700, requires_grad=True)
    counts = torch.tensor([1, 127, 0, 128, 129, 200])  # 115 rows are past the counts
    expect_contract(v, on_gpu(v), lambda t: machmoe.grouped_mlp(
        t["x"], counts.to(t["x"].device), t["w1"], t["w2"], row_scores=t["weights"], b1=t["b1"], b2=t["b2"]))  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_is_seen_through_every_activation(activation):
    v = on_gpu(leaves(300, 64, 64, 4, 2, gated=ACTIVATIONS.index(activation) < 4))
    with torch.no_grad():
        v["x"][7, 5] = math.nan
    out = machmoe.experts(v["x"], v["w1"], v["w2"], torch.rand(300, 4).topk(2).indices.to(CUDA), v["weights"], activation=activation)
    (dx,) = torch.autograd.grad(out[7].sum(), v["x"])
    others = torch.arange(300, device=CUDA) != 7
    assert out[7].isnan().all() and out[others].isfinite().all() and dx[7].isnan().any()


def test_one_expert_may_have_any_stride():
    v = on_gpu(leaves(300, 64, 96, 1, 1))
    ids = torch.zeros(300, 1, dtype=torch.int32, device=CUDA)
    w1, w2 = (v[name].detach().as_strided(v[name].shape, (13, v[name].shape[2], 1)).requires_grad_() for name in ("w1", "w2"))
    out, want = (machmoe.experts(v["x"], *w, ids, v["weights"]) for w in ((w1, w2), (v["w1"], v["w2"])))
    assert torch.equal(out, want)
    got, expected = torch.autograd.grad(out.sum(), (w1, w2)), torch.autograd.grad(want.sum(), (v["w1"], v["w2"]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_counts_that_add_up_beyond_every_integer_are_cut_off():
    v = on_gpu(leaves(700, 128, 64, 3, 1))
    rows, w1, w2 = v["x"], v["w1"], v["w2"]
    out = machmoe.grouped_mlp(rows, torch.full((3,), 2**30, device=CUDA), w1, w2)
    assert torch.equal(out, machmoe.grouped_mlp(rows, torch.tensor([700, 0, 0], device=CUDA), w1, w2))


def test_tensors_may_begin_at_any_element():
    """A piece of a concatenation is contiguous, but it need not begin where 16 bytes can be read at once."""
    v = on_gpu(leaves(300, 64, 64, 4, 2))
    ids = torch.rand(300, 4).topk(2).indices.to(CUDA)
    addend, d_o = torch.randn(2, 300, 64, device=CUDA).bfloat16()

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def run(move):
        x, added = move(v["x"]), move(addend)
        out = machmoe.experts(x, v["w1"], v["w2"], ids, v["weights"], addend=added)
        fused, aux = machmoe.layer(x, v["w2"][:, :, 0].contiguous(), v["w1"], v["w2"], 2, addend=added)
        return [out, fused, *torch.autograd.grad((out, fused, aux), tuple(v.values()), (move(d_o), move(d_o), aux.new_ones(())))]

    for got, want in zip(run(shifted), run(lambda t: t), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk"])
def test_layer_is_route_and_experts(router):
    v = leaves(500, 128, 64, 8, 2)
    del v["weights"]
    v["router"] = (torch.randn(8, 128) / 8).bfloat16()
    g = on_gpu(v)

    def gradients(out, aux):
        return torch.autograd.grad(out.float().square().sum() + aux, tuple(g.values()))

    ids, weights, _, aux = machmoe.route(torch.mm(g["x"], g["router"].t()), 2, router=router)
    parts = machmoe.experts(g["x"], g["w1"], g["w2"], ids, weights), aux
    fused = machmoe.layer(g["x"], g["router"], g["w1"], g["w2"], 2, router=router)
    assert torch.equal(fused[0], parts[0])
    for name, a, b in zip(g, gradients(*fused), gradients(*parts), strict=True):
        assert error(a, b) <= 4e-3, name


def test_layouts_recompute_and_repeats_give_equal_bits():
    v = on_gpu(leaves(900, 128, 96, 8, 2))
    ids = torch.rand(900, 8).topk(2).indices.to(CUDA)
    gate, up = (t.contiguous() for t in v["w1"].detach().chunk(2, 1))
    interleaved = torch.stack((gate, up), 2).flatten(1, 2)
    d_o = torch.randn(900, 128, device=CUDA, dtype=torch.bfloat16)

    def run(w1, **options):
        out = machmoe.experts(v["x"], w1, v["w2"], ids, v["weights"], **options)
        return [out, *torch.autograd.grad(out, (v["x"], v["w2"], v["weights"]), d_o)]

    want = run(v["w1"])
    for options in ({}, {"recompute": True}):
        for w1, extra in ((v["w1"], {}), ((gate, up), {}), (interleaved, {"w1_layout": "interleaved"})):
            assert all(torch.equal(a, b) for a, b in zip(run(w1, **options, **extra), want, strict=True))


def test_forward_and_backward_in_a_cuda_graph():
    v = on_gpu(leaves(512, 128, 64, 8, 2))
    ids = torch.rand(512, 8).topk(2).indices.to(CUDA)

    def step():
        out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
        return [out, *torch.autograd.grad(out.float().square().sum(), tuple(v.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ids.copy_(torch.rand(512, 8).topk(2).indices)
    with torch.no_grad():
        v["x"].normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_an_event_of_another_stream_is_waited_for():
    v = on_gpu(leaves(512, 128, 64, 8, 2))
    ids, source = torch.rand(512, 8).topk(2).indices.to(CUDA), v["x"].detach().clone()
    expected = machmoe.experts(source, v["w1"], v["w2"], ids, v["weights"])
    x, side, main = torch.full_like(source, float("nan")), torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    machmoe.experts(source, v["w1"], v["w2"], ids, v["weights"])  # a kernel of the library is the last of this stream
    with torch.cuda.stream(side):
        torch.cuda._sleep(5_000_000)
        x.copy_(source)
    main.wait_stream(side)
    assert torch.equal(machmoe.experts(x, v["w1"], v["w2"], ids, v["weights"]), expected)


@torch.no_grad()
def test_streams_part_and_join_in_a_cuda_graph():
    v = on_gpu(leaves(512, 128, 64, 8, 2))
    first, second = (torch.rand(512, 8).topk(2).indices.to(CUDA) for _ in range(2))
    side = torch.cuda.Stream()

    def step():
        x, main = v["x"] * 2, torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            one = machmoe.experts(x, v["w1"], v["w2"], first, v["weights"])
        other = machmoe.experts(x, v["w1"], v["w2"], second, v["weights"])
        main.wait_stream(side)
        return machmoe.experts(one + other, v["w1"], v["w2"], first, v["weights"])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(10):
        v["x"].normal_()
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, step())


@pytest.mark.parametrize("routing", ["topk", "token-rounding"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_in_one_graph(routing, dynamic):
    moe = machmoe.MoE(128, 64, 8, 2, device=CUDA, dtype=torch.bfloat16, routing=routing)
    compiled = torch.compile(moe, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (1000, 1300):
        x = torch.randn(tokens, 128, device=CUDA, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), moe(x))


def test_saved_bytes():
    T, d, n, E, K = 4096, 512, 256, 64, 4
    v = on_gpu(leaves(T, d, n, E, K))
    ids = torch.rand(T, E).topk(K).indices.to(CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
    saved = torch.cuda.memory_allocated() - before - out.numel() * 2
    _, metadata = metadata_layout(TOPK, T, E, T * K, cuda=True)
    assert 0 <= saved - 4 * T * K * n - 4 * metadata < 1024, "beside H the metadata alone, in blocks of 512 bytes"


@pytest.mark.parametrize("retain", [False, True])
def test_peak_memory_of_the_backward(retain):
    """dX~, dX and the gradients; dH takes the place of H unless the graph is retained."""
    T, d, n, E, K = 4096, 512, 256, 64, 4
    v = on_gpu(leaves(T, d, n, E, K))
    ids = torch.rand(T, E).topk(K).indices.to(CUDA)
    d_o = torch.randn(T, d, device=CUDA, dtype=torch.bfloat16)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, tuple(v.values()), d_o, retain_graph=retain)
    peak = torch.cuda.max_memory_allocated() - before
    gradients, dx_rows, h = sum(t.nbytes for t in v.values()), 2 * T * K * d, 4 * T * K * n
    needed = gradients + dx_rows + (h + 4 * T * K if retain else 0)
    assert needed <= peak <= needed + 16 * 1024


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="expected torch.bfloat16"):
        machmoe.experts(
            *(torch.randn(s, device=CUDA) for s in ((4, 8), (2, 16, 8), (2, 8, 8))),
            torch.zeros(4, 1, device=CUDA, dtype=torch.int64),
            torch.ones(4, 1, device=CUDA),
        )


@pytest.mark.parametrize("index", range(torch.cuda.device_count()))
def test_the_tensors_decide_the_device(index):
    """Not the current one, which is cuda:0 here."""
    v = leaves(600, 128, 64, 8, 2)
    ids, scores, d_o = torch.rand(600, 8).topk(2).indices, torch.rand(600, 8).softmax(-1), torch.randn(600, 128).bfloat16()
    router_w = torch.randn(8, 128).bfloat16()

    def run(device):
        x, w1, w2, weights = (v[name].detach().to(device).requires_grad_() for name in ("x", "w1", "w2", "weights"))
        s, r = (t.to(device).requires_grad_() for t in (scores, router_w))
        outs = (
            machmoe.experts(x, w1, w2, ids.to(device), weights),
            machmoe.experts_general(x, w1, w2, machmoe.token_round(s, 2, 64)),
            machmoe.layer(x, r, w1, w2, 2)[0],
        )
        return [t.cpu() for t in (*outs, *torch.autograd.grad(sum(outs), (x, w1, w2, weights, s, r), d_o.to(device)))]

    with torch.cuda.device(0):
        there = run(f"cuda:{index}")
        assert torch.cuda.current_device() == 0
        assert all(torch.equal(a, b) for a, b in zip(there, run("cuda:0"), strict=True))


def test_a_thread_that_launched_nothing_before_finds_its_device():
    v = on_gpu(leaves(300, 64, 64, 4, 2))
    ids = torch.rand(300, 4).topk(2).indices.to(CUDA)
    outputs = []

    def forward():
        outputs.append(machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"]).detach().cpu())

    forward()  # from here on torch has cached all the memory that another call needs
    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    assert torch.equal(*outputs)
