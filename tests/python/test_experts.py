"""experts, experts_general, grouped_mlp and layer against the layer written in plain torch, in fp64."""

import math

import machmoe
import pytest
import torch
from machmoe._library import TOPK, metadata_layout, ops
from torch.utils._python_dispatch import TorchDispatchMode

F = torch.nn.functional
ACTIVATIONS = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "swiglu_oai": lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
    "geglu": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: F.relu(g) * u,
    "relu2": lambda g, u: F.relu(u).square(),
    "relu": lambda g, u: F.relu(u),
    "gelu": lambda g, u: F.gelu(u, approximate="tanh"),
    "gelu_erf": lambda g, u: F.gelu(u),
    "silu": lambda g, u: F.silu(u),
}
GATED = {"swiglu", "swiglu_oai", "geglu", "reglu"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
T, D, N, E, K = 61, 40, 24, 6, 3


def leaves(dtype, activation="swiglu", bias=False, seed=0, shape=(T, D, N, E, K)):
    torch.manual_seed(seed)
    t, d, n, e, k = shape
    planes = 2 if activation in GATED else 1
    made = {
        "x": torch.randn(t, d),
        "w1": torch.randn(e, planes * n, d) / math.sqrt(d),
        "w2": torch.randn(e, d, n) / math.sqrt(n),
        "weights": torch.rand(t, k),
    }
    if bias:
        made |= {"b1": torch.randn(e, planes * n), "b2": torch.randn(e, d)}
    return {name: t.to(torch.float32 if name == "weights" else dtype).requires_grad_() for name, t in made.items()}


def chosen_ids(seed=0):
    torch.manual_seed(seed)
    return torch.rand(T, E).topk(K).indices


def plain(v, ids, activation="swiglu", addend=None):
    """The definition, one expert at a time, in the dtype of v."""
    out = torch.zeros_like(v["x"]) if addend is None else addend
    num_experts, _, n = v["w2"].shape
    for e in range(num_experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        h = v["x"][token] @ v["w1"][e].T + (v["b1"][e] if "b1" in v else 0)
        g, u = (h[:, :n], h[:, n:]) if activation in GATED else (None, h)
        y = ACTIVATIONS[activation](g, u) @ v["w2"][e].T + (v["b2"][e] if "b2" in v else 0)
        out = out.index_add(0, token, y * v["weights"][token, slot, None])
    return out


def in_fp64(v):
    return {name: t.detach().double().requires_grad_() for name, t in v.items()}


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item() if b.norm() > 0 else a.abs().max().item()


def expect_equal_gradients(v, out, reference, want, tolerance):
    assert error(out, want) <= tolerance
    d_o = torch.randn(out.shape, dtype=out.dtype)
    out.backward(d_o)
    want.backward(d_o.double())
    for name, t in v.items():
        assert t.grad.dtype == t.dtype and t.grad.shape == t.shape
        assert error(t.grad, reference[name].grad) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_their_definition(activation, dtype):
    v, ids = leaves(dtype, activation, bias=True), chosen_ids()
    ref = in_fp64(v)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"], activation=activation, b1=v["b1"], b2=v["b2"])
    expect_equal_gradients(v, out, ref, plain(ref, ids, activation), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_a_limit_clamps_gate_and_up(activation):
    v, ids, limit = leaves(torch.float32, bias=True), chosen_ids(), 0.7
    ref = in_fp64(v)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"], activation=activation, b1=v["b1"], b2=v["b2"], limit=limit)
    clamped = {
        "swiglu": lambda g, u: F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit),
        "swiglu_oai": lambda g, u: (u.clamp(-limit, limit) + 1) * g.clamp(max=limit) * torch.sigmoid(1.702 * g.clamp(max=limit)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACTIVATIONS, activation, clamped[activation])
        want = plain(ref, ids, activation)
    expect_equal_gradients(v, out, ref, want, TOLERANCE[torch.float32])


def random_ids(t, e, k):
    return torch.rand(t, e).topk(k).indices


def consecutive(t, e, k, *counts):
    """The first counts[0] tokens choose expert 0, the next counts[1] expert 1, ...: K = 1."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]


CASES = {  # T, d, n, E, K and the ids
    "one token": ((1, 8, 8, 1, 1), random_ids),
    "every expert": ((33, 8, 104, 4, 4), random_ids),
    "odd sizes": ((77, 72, 104, 9, 3), random_ids),
    "one expert takes all": ((200, 16, 8, 5, 1), lambda t, e, k: torch.full((t, k), 3)),
    "1, 127, 0, 128, 129 rows": ((385, 24, 16, 6, 1), lambda *s: consecutive(*s, 1, 127, 0, 128, 129)),
    "all dropped": ((20, 16, 16, 3, 2), lambda t, e, k: torch.full((t, k), e + 5)),
    "more experts than rows": ((5, 16, 16, 300, 2), random_ids),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_case_table(case, dtype):
    shape, pattern = CASES[case]
    v = leaves(dtype, bias=True, shape=shape)
    t, _, _, e, k = shape
    ids = pattern(t, e, k)
    ref = in_fp64(v)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"], b1=v["b1"], b2=v["b2"])
    expect_equal_gradients(v, out, ref, plain(ref, ids), TOLERANCE[dtype])


def test_nan_stays_with_its_expert():
    v, ids = leaves(torch.bfloat16), chosen_ids()
    with torch.no_grad():
        v["w1"][2, 5, 7] = v["w2"][4, 0, 0] = math.nan
    touched = ((ids == 2) | (ids == 4)).any(1)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
    out.sum().backward()
    sound = [0, 1, 3, 5]
    assert torch.isfinite(out[~touched]).all() and torch.isfinite(v["x"].grad[~touched]).all()
    assert torch.isfinite(v["w1"].grad[sound]).all() and torch.isfinite(v["w2"].grad[sound]).all()
    assert out[touched].isnan().any()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_and_weights_are_read_in_their_own_types(ids_dtype, weights_dtype):
    v, ids = leaves(torch.float32), chosen_ids()
    v["weights"] = v["weights"].detach().to(weights_dtype).requires_grad_()
    ref = in_fp64(v)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids.to(ids_dtype), v["weights"])
    want = plain(ref, ids)
    assert error(out, want) <= 1e-5
    out.sum().backward()
    want.sum().backward()
    assert v["weights"].grad.dtype == weights_dtype
    assert error(v["weights"].grad, ref["weights"].grad) <= (1e-5 if weights_dtype == torch.float32 else 4e-3)


def test_weights_changed_before_the_backward_raise():
    """fp32 ones are read again by the backward; of half precision a copy is kept."""
    for dtype in (torch.float32, torch.bfloat16):
        v, ids = leaves(torch.float32), chosen_ids()
        chosen = v["weights"].detach().to(dtype)
        out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, chosen).sum()
        want = torch.autograd.grad(out, v["x"], retain_graph=True)
        chosen.mul_(2)
        if dtype == torch.float32:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()
        else:
            torch.testing.assert_close(torch.autograd.grad(out, v["x"]), want)


def test_operators_refuse_scores_of_another_dtype_or_number():
    v, ids = leaves(torch.float32), chosen_ids()
    call = (v["x"].detach(), v["w1"].detach(), None, v["w2"].detach(), None, None, None, None, ids)
    for scores, words in ((v["weights"].detach().bfloat16(), "are not float32"), (v["weights"].detach()[:1].contiguous(), "one for each of the")):
        with pytest.raises(RuntimeError, match=words):
            ops.topk_experts_forward(*call, scores, 0, 1.702, 0.0, False, True)


def test_addend_is_added_and_gets_its_gradient():
    v, ids = leaves(torch.float32), chosen_ids()
    v["addend"] = torch.randn(T, D).requires_grad_()
    ref = in_fp64(v)
    out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"], addend=v["addend"])
    expect_equal_gradients(v, out, ref, plain(ref, ids, addend=ref["addend"]), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts_and_recompute_give_equal_bits(dtype):
    v, ids = leaves(dtype), chosen_ids()
    gate, up = (t.detach().clone().requires_grad_() for t in v["w1"].chunk(2, 1))
    interleaved = torch.stack((gate, up), 2).flatten(1, 2).detach().requires_grad_()
    d_o = torch.randn(T, D, dtype=dtype)

    def run(w1, **options):
        for t in (*v.values(), gate, up, interleaved):
            t.grad = None
        out = machmoe.experts(v["x"], w1, v["w2"], ids, v["weights"], **options)
        out.backward(d_o)
        return [out, v["x"].grad, v["w2"].grad, v["weights"].grad]

    want = run(v["w1"])
    dw1 = v["w1"].grad
    for got in (run((gate, up)), run(v["w1"], recompute=True)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    run((gate, up))
    assert torch.equal(torch.cat((gate.grad, up.grad), 1), dw1)
    got = run(interleaved, w1_layout="interleaved")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(torch.cat((interleaved.grad[:, 0::2], interleaved.grad[:, 1::2]), 1), dw1)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_torchs_threads(threads):
    v, ids = leaves(torch.bfloat16), chosen_ids()

    def run(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
            return [out, *torch.autograd.grad(out.square().sum(), tuple(v.values()))]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(threads), strict=True))


def test_gradcheck_in_fp64():
    torch.manual_seed(1)
    t, d, n, e, k = 5, 8, 8, 3, 2
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((t, d), (e, 2 * n, d), (e, d, n), (t, k), (e, 2 * n), (e, d))]
    ids = torch.rand(t, e).topk(k).indices
    assert torch.autograd.gradcheck(lambda x, w1, w2, s, b1, b2: machmoe.experts(x, w1, w2, ids, s, b1=b1, b2=b2), args)
    rows, router = torch.randn(t, dtype=torch.float64, requires_grad=True), torch.randn(e, d, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 2])  # one row is past the counts
    assert torch.autograd.gradcheck(lambda x, w1, w2, s: machmoe.grouped_mlp(x, counts, w1, w2, row_scores=s), (*args[:3], rows))
    assert torch.autograd.gradcheck(lambda x, w1, w2, r: machmoe.layer(x, r, w1, w2, k), (*args[:3], router))


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["constant gradient", "gradient of its own"])
def test_double_backward_raises(loss):
    v, ids = leaves(torch.float32), chosen_ids()
    (dx,) = torch.autograd.grad(loss(machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])), v["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_dropped_ids_contribute_nothing():
    v, ids = leaves(torch.float32), chosen_ids()
    ids[::3, 1] = E
    ids[::5] = E + 7
    ref = in_fp64(v)
    expect_equal_gradients(v, machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"]), ref, plain(ref, ids), 1e-5)
    assert (v["weights"].grad[ids >= E] == 0).all()


def test_no_tokens_give_empty_results_and_zero_gradients():
    v = leaves(torch.float32)
    x, weights = torch.empty(0, D, requires_grad=True), torch.empty(0, K, requires_grad=True)
    out = machmoe.experts(x, v["w1"], v["w2"], torch.empty(0, K, dtype=torch.int64), weights)
    out.sum().backward()
    assert out.shape == (0, D) and x.grad.shape == (0, D) and weights.grad.shape == (0, K)
    assert (v["w1"].grad == 0).all() and (v["w2"].grad == 0).all()


def test_grouped_mlp_is_the_experts_on_dispatched_rows():
    v, ids = leaves(torch.float32), chosen_ids()
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=E)
    padding = 9
    rows = torch.cat((v["x"].detach()[order // K], torch.full((padding, D), math.nan))).requires_grad_()
    scores = torch.cat((v["weights"].detach().flatten()[order], torch.zeros(padding))).requires_grad_()
    y = machmoe.grouped_mlp(rows, counts, v["w1"], v["w2"], row_scores=scores)
    assert (y[-padding:] == 0).all()
    want = plain(in_fp64(v), ids)
    assert error(torch.zeros(T, D).index_add(0, order // K, y[:-padding]), want) <= 1e-5
    y.sum().backward()
    assert (rows.grad[-padding:] == 0).all() and (scores.grad[-padding:] == 0).all()
    assert torch.isfinite(v["w1"].grad).all()


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "softmax_topk_norm"])
def test_layer_is_route_and_experts(router):
    v = leaves(torch.float32)
    del v["weights"]
    v["router"] = torch.randn(E, D, requires_grad=True)

    def parts():
        ids, weights, _, aux = machmoe.route(v["x"] @ v["router"].T, K, router=router)
        return machmoe.experts(v["x"], v["w1"], v["w2"], ids, weights), aux

    def gradients(out, aux):
        return torch.autograd.grad((out.square().sum() + 3 * aux), tuple(v.values()))

    fused = machmoe.layer(v["x"], v["router"], v["w1"], v["w2"], K, router=router)
    for a, b in zip(fused, parts(), strict=True):
        assert torch.equal(a, b)
    for name, a, b in zip(v, gradients(*fused), gradients(*parts()), strict=True):
        assert error(a, b.double()) <= 1e-5, name


def saved_bytes(run, *apart):
    """Bytes of the storages that `run` saves for its backward, without those of the tensors `apart`."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert run().requires_grad
    for t in apart:
        assert saved.pop(t.untyped_storage().data_ptr())
    return sum(saved.values())


@pytest.mark.parametrize("n", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes_are_h_and_metadata(n, recompute):
    """x and all weights themselves, 4 R_cap n bytes of H, metadata: of top-K 8 bytes a row. At constant K n it does not grow with the granularity."""
    k, tokens, d = 1024 // n, 256, 64
    e = 4 * k
    x, w1, w2 = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((tokens, d), (e, 2 * n, d), (e, d, n)))
    scores = torch.rand(tokens, e)
    weights, ids = scores.topk(k)
    weights.requires_grad_()
    general = machmoe.Routing.from_topk(ids, weights, e)
    rounded = machmoe.token_round(scores.div(2).requires_grad_(), k, 16)

    def allowed(rows):
        return (0 if recompute else 4 * rows * n) + 16 * rows + 64 * e + 64 * 1024

    _, metadata = metadata_layout(TOPK, tokens, e, tokens * k, cuda=False)
    assert 4 * metadata <= 8 * tokens * k + 8 * e + 4 * 256
    h = 0 if recompute else 4 * tokens * k * n
    assert saved_bytes(lambda: machmoe.experts(x, w1, w2, ids, weights, recompute=recompute), x, w1, w2, weights) == h + 4 * metadata
    for routing in (general, rounded):
        assert saved_bytes(lambda r=routing: machmoe.experts_general(x, w1, w2, r, recompute=recompute), x, w1, w2) <= allowed(routing.capacity)
    rows = torch.randn(tokens * k, d, dtype=torch.bfloat16)
    counts = torch.full((e,), tokens * k // e, dtype=torch.int32)
    assert saved_bytes(lambda: machmoe.grouped_mlp(rows, counts, w1, w2, recompute=recompute), rows, w1, w2) <= allowed(tokens * k)


def runs_of_every_kind():
    """(leaves, function of them) of experts, experts_general, grouped_mlp and layer."""
    v, ids = leaves(torch.float32), chosen_ids()
    x, w1, w2, weights = (v[name] for name in ("x", "w1", "w2", "weights"))
    router_w = torch.randn(E, D, requires_grad=True)
    counts = torch.bincount(ids.flatten(), minlength=E)
    rows = torch.randn(int(counts.sum()), D, requires_grad=True)
    return {
        "experts": ((x, w1, w2, weights), lambda: machmoe.experts(x, w1, w2, ids, weights)),
        "experts_general": ((x, w1, w2, weights), lambda: machmoe.experts_general(x, w1, w2, machmoe.Routing.from_topk(ids, weights, E))),
        "grouped_mlp": ((rows, w1, w2), lambda: machmoe.grouped_mlp(rows, counts, w1, w2)),
        "layer": ((x, w1, w2, router_w), lambda: machmoe.layer(x, router_w, w1, w2, K)[0]),
    }


KINDS = ("experts", "experts_general", "grouped_mlp", "layer")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_backward_writes_dh_over_h(kind):
    """A retained graph keeps its H; the gradients are the same."""
    inputs, run = runs_of_every_kind()[kind]
    unpacked = []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = run().square().sum()
    gradients, saved = [], []
    for keep in (True, True, False):
        gradients.append(torch.autograd.grad(loss, inputs, retain_graph=keep))
        (h,) = {id(t): t for t in unpacked if t.shape[1:] == (2, N)}.values()
        saved.append(h.clone())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    assert torch.equal(saved[0], saved[1]) and not torch.equal(saved[0], saved[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_failed_over_h_is_not_repeated(kind):
    inputs, run = runs_of_every_kind()[kind]
    out = run()

    def fail(*_):
        raise KeyError("from a hook")

    handle = out.grad_fn.register_hook(fail)
    d_out = torch.randn(out.shape)
    with pytest.raises(KeyError):
        torch.autograd.grad(out, inputs, d_out)
    handle.remove()
    for keep in (True, False):
        with pytest.raises(RuntimeError, match="run the forward again"):
            torch.autograd.grad(out, inputs, d_out, retain_graph=keep)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients_are_those_of_each(kind):
    inputs, run = runs_of_every_kind()[kind]
    out = run()
    d_out = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, inputs, each, retain_graph=True) for each in d_out]
    batched = torch.autograd.grad(out, inputs, d_out, is_grads_batched=True)
    for got, want in zip(batched, zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(got, torch.stack(want))


def test_batched_gradients_of_the_load_balance_loss_alone():
    x, router_w, w1, w2 = (torch.randn(s, requires_grad=True) for s in ((T, D), (E, D), (E, 2 * N, D), (E, D, N)))
    _, aux = machmoe.layer(x, router_w, w1, w2, K)
    factors = torch.tensor([1.0, -2.0, 3.0])
    one_by_one = torch.stack([torch.autograd.grad(aux, x, factor, retain_graph=True)[0] for factor in factors])
    (batched,) = torch.autograd.grad(aux, x, factors, is_grads_batched=True)
    assert torch.equal(batched, one_by_one)


def test_without_gradients_h_is_not_written():
    v, ids = leaves(torch.float32), chosen_ids()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.machmoe.topk_experts_forward.default:
                written.append(out[1] is not None)
            return out

    written = []
    with Recorder():
        machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
        with torch.no_grad():
            machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
            machmoe.layer(v["x"], torch.randn(E, D), v["w1"], v["w2"], K)
    assert written == [True, False, False]


def test_a_backward_under_autocast_keeps_the_types_of_its_forward():
    v = leaves(torch.float32)
    del v["weights"]
    v["router"] = torch.randn(E, D, requires_grad=True)
    out, aux = machmoe.layer(v["x"], v["router"], v["w1"], v["w2"], K)
    loss = out.square().sum() + aux
    want = torch.autograd.grad(loss, tuple(v.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, tuple(v.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_casts_outside_and_keeps_gradient_dtypes():
    v, ids = leaves(torch.float32), chosen_ids()
    with torch.autocast("cpu", torch.bfloat16):
        out = machmoe.experts(v["x"], v["w1"], v["w2"], ids, v["weights"])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in v.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.randn(T, 12)}, r"x is \(61, 12\), expected \[61, 40\] beside w2"),
        ({"w1": torch.randn(E, N, D)}, r"w1 is \(6, 24, 40\), expected \[6, 48, 40\]"),
        ({"w2": torch.randn(E, D, N).bfloat16()}, r"w2 is torch.bfloat16 on cpu, expected torch.float32"),
        ({"w1": torch.randn(E, D, 2 * N).transpose(1, 2)}, r"w1 has stride 48 in its last dimension"),
        ({"topk_ids": torch.zeros(T, K + 1, dtype=torch.int64)}, r"topk_ids is \(61, 4\)"),
        ({"topk_ids": torch.zeros(T, K, dtype=torch.int64)}, r"names expert 0 twice"),
        ({"topk_ids": torch.full((T, K), -1)}, r"topk_ids\[0, 0\] is -1"),
        ({"activation": "swiglu_oai", "alpha": 0.0}, "alpha is 0, expected another number"),
        ({"activation": "swish"}, r"activation is 'swish', expected one of swiglu"),
        ({"w1_layout": "transposed"}, r"w1_layout is 'transposed'"),
        ({"b2": torch.randn(E, N)}, r"b2 is \(6, 24\), expected \[6, 40\]"),
        ({"b1": (torch.randn(E, N), torch.randn(E, N))}, r"one of w1 and b1 is a pair"),
        ({"w1": (torch.randn(E, N, D),)}, r"w1 is a sequence of 1 tensors"),
        ({"topk_ids": torch.zeros(T, K, device="meta", dtype=torch.int64)}, r"topk_ids is on meta, expected cpu as x: move it"),
        ({"topk_ids": torch.zeros(T, K)}, r"topk_ids is torch.float32, expected torch.int32 or torch.int64"),
        ({"topk_weights": torch.zeros(T, K, dtype=torch.int32)}, r"topk_weights is torch.int32, expected torch.float32"),
        ({"x": torch.randn(T, D).half()}, r"x is torch.float16 on cpu, expected torch.float32 or torch.bfloat16 or torch.float64: cast"),
    ],
)
def test_errors_name_the_argument(change, sentence):
    v = leaves(torch.float32)
    call = {"x": v["x"], "w1": v["w1"], "w2": v["w2"], "topk_ids": chosen_ids(), "topk_weights": v["weights"]} | change
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        machmoe.experts(**call)


@pytest.mark.parametrize("count", [torch.tensor(T + 1, dtype=torch.int32), torch.tensor(T + 1), torch.tensor(2**32 + 4)])
def test_more_counts_than_rows_are_refused(count):
    v = leaves(torch.float32)
    with pytest.raises(RuntimeError, match="expected at most the 61 rows"):
        machmoe.grouped_mlp(v["x"], torch.cat([count[None], count.new_zeros(E - 1)]), v["w1"], v["w2"])


def test_sizes_that_are_no_multiple_of_8_are_refused():
    with pytest.raises(RuntimeError, match="d is 12, expected a multiple of 8"):
        machmoe.experts(torch.randn(2, 12), torch.randn(1, 16, 12), torch.randn(1, 12, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
