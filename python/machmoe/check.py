"""`python -m machmoe check`: the numerics contract on this machine.

Every entry point runs forward and backward on fresh unit-variance data and is compared with fp64 autograd over plain per-expert products: relative
Frobenius error of the output and of every gradient, and bit equality of a second run."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import machmoe

from .arguments import ROUTERS, RULES
from .device import parse_device
from .errors import need
from .table import print_table

TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5}

ACTIVATIONS = {  # gate and up -> A in fp64; without a gate the first argument is None
    "swiglu": lambda g, u: F.silu(g) * u,
    "swiglu_oai": lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
    "geglu": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: F.relu(g) * u,
    "relu2": lambda _, u: F.relu(u).square(),
    "relu": lambda _, u: F.relu(u),
    "gelu": lambda _, u: F.gelu(u, approximate="tanh"),
    "gelu_erf": lambda _, u: F.gelu(u),
    "silu": lambda _, u: F.silu(u),
}
GATED = ("swiglu", "swiglu_oai", "geglu", "reglu")


@dataclass
class Case:
    name: str
    leaves: dict  # name -> tensor that gets a gradient
    ours: Callable  # leaves in their own types -> output or outputs
    reference: Callable  # the same leaves in fp64 -> output or outputs
    outputs: tuple = ("O",)


@dataclass
class Result:
    case: str
    dtype: torch.dtype
    errors: dict = field(default_factory=dict)  # O, dX, ... -> relative error
    same_bits: bool = False
    failure: str = ""

    @property
    def passed(self):
        return not self.failure and self.same_bits and all(error <= TOLERANCE[self.dtype] for error in self.errors.values())


# ---- the reference -----------------------------------------------------------------------------------------------------------------
def expert_rows(x, gate, up, w2, e, activation, b1=None, b2=None):
    def h(w, bias):
        return x @ w[e].t() + (0 if bias is None else bias[e])

    b_gate, b_up = (None, b1) if b1 is None or gate is None else b1.chunk(2, dim=1)
    a = ACTIVATIONS[activation](None if gate is None else h(gate, b_gate), h(up, b_up))
    return a @ w2[e].t() + (0 if b2 is None else b2[e])


def reference_experts(x, gate, up, w2, token, expert, score, activation="swiglu", b1=None, b2=None, addend=None):
    """O_t = addend_t + sum over the rows of t of s y; rows with expert >= E contribute nothing."""
    o = torch.zeros_like(x) if addend is None else addend
    for e in range(w2.shape[0]):
        rows = (expert == e).nonzero().flatten()
        y = expert_rows(x[token[rows]], gate, up, w2, e, activation, b1, b2)
        o = o.index_add(0, token[rows], y * score[rows, None])
    return o


def reference_route(logits, ids, router):
    """Weights of the given choice, and the load-balance loss."""
    prob = logits.softmax(-1)
    weights = logits.gather(1, ids).softmax(-1) if router == "topk_softmax" else prob.gather(1, ids)
    if router == "softmax_topk_norm":
        weights = weights / weights.sum(-1, keepdim=True)
    share = torch.bincount(ids.flatten(), minlength=logits.shape[1]).double() / ids.numel()
    return weights, logits.shape[1] * (share * prob.mean(0)).sum()


# ---- the cases -----------------------------------------------------------------------------------------------------------------------
class Data:
    """Unit-variance tensors of one size and one routing."""

    def __init__(self, dtype, device, T=384, d=128, n=64, E=8, K=2, seed=0):
        self.dtype, self.device, self.generator = dtype, device, torch.Generator().manual_seed(seed)
        self.T, self.d, self.n, self.E, self.K = T, d, n, E, K
        self.router_w = self.normal(E, d, scale=d**-0.5)
        self.x = self.separated_tokens()
        self.w_gate, self.w_up = self.normal(E, n, d, scale=d**-0.5), self.normal(E, n, d, scale=d**-0.5)
        self.w2 = self.normal(E, d, n, scale=n**-0.5)
        self.logits = torch.randn(T, E, generator=self.generator).to(device)
        top, self.ids = self.logits.topk(K)
        self.weights = top.softmax(-1)
        self.token = torch.arange(T, device=device).repeat_interleave(K)

    def normal(self, *sizes, scale=1.0):
        return (torch.randn(*sizes, generator=self.generator) * scale).to(self.device, self.dtype)

    def separated_tokens(self):
        """Tokens whose router logits leave no doubt about the top K, so that rounding cannot change the choice."""
        pool = self.normal(8 * max(1, self.T), self.d)
        top = (pool.double() @ self.router_w.double().t()).sort(dim=1, descending=True).values
        clear = (top[:, self.K - 1] - top[:, self.K] > 0.05).nonzero().flatten()
        return pool[clear[: self.T]].contiguous()

    @property
    def w1(self):
        return torch.cat((self.w_gate, self.w_up), dim=1)

    def experts_case(self, name, activation="swiglu", layout="concatenated", ids=None, weights=None, biases=False, addend=False, recompute=False):
        ids = self.ids if ids is None else ids
        leaves = {"X": self.x, "W2": self.w2, "S": self.weights if weights is None else weights}
        token = torch.arange(ids.shape[0], device=self.device).repeat_interleave(ids.shape[1])
        gated = activation in GATED
        if not gated:
            leaves["W1"] = self.w_up
            ours_w1, planes = (lambda v: v["W1"]), (lambda v: (None, v["W1"]))
        elif layout == "pair":
            leaves |= {"W gate": self.w_gate, "W up": self.w_up}
            ours_w1 = planes = lambda v: (v["W gate"], v["W up"])
        elif layout == "interleaved":
            leaves["W1"] = torch.stack((self.w_gate, self.w_up), dim=2).reshape(self.E, 2 * self.n, self.d)
            ours_w1, planes = (lambda v: v["W1"]), (lambda v: (v["W1"][:, 0::2], v["W1"][:, 1::2]))
        else:
            leaves["W1"] = self.w1
            ours_w1, planes = (lambda v: v["W1"]), (lambda v: v["W1"].chunk(2, dim=1))
        if biases:
            leaves |= {"b1": self.normal(self.E, (2 if gated else 1) * self.n), "b2": self.normal(self.E, self.d)}
        if addend:
            leaves["addend"] = self.normal(*self.x.shape)
        options = {"activation": activation, "recompute": recompute} | ({} if layout == "pair" else {"w1_layout": layout})

        def extra(v):
            return {key: v[key] for key in ("b1", "b2", "addend") if key in v}

        return Case(
            name,
            leaves,
            lambda v: machmoe.experts(v["X"], ours_w1(v), v["W2"], ids, v["S"], **options, **extra(v)),
            lambda v: reference_experts(v["X"], *planes(v), v["W2"], token, ids.flatten(), v["S"].flatten(), activation, **extra(v)),
        )

    def lists_case(self):
        """Any (token, expert, score) list in any order: here half of all pairs, tokens with 0 to E rows."""
        chosen = torch.rand(self.T, self.E, generator=self.generator).to(self.device) < 0.5
        token, expert = chosen.nonzero().unbind(1)
        order = torch.randperm(len(token), generator=self.generator).to(self.device)
        token, expert = token[order], expert[order]
        score = torch.rand(len(token), generator=self.generator).to(self.device)
        leaves = {"X": self.x, "W1": self.w1, "W2": self.w2, "S": score}

        def ours(v):
            routing = machmoe.Routing.from_lists(token, expert, v["S"], self.T, self.E)
            return machmoe.experts_general(v["X"], v["W1"], v["W2"], routing)

        return Case(
            "experts_general, lists", leaves, ours, lambda v: reference_experts(v["X"], *v["W1"].chunk(2, dim=1), v["W2"], token, expert, v["S"])
        )

    def rounding_case(self, rule, tile=16):
        scores = self.logits.softmax(-1)
        options = {"rule": rule, "renormalize": rule != "up"} | ({"seed": 7} if rule in ("sr_f", "nr_s") else {})
        chosen = machmoe.token_round(scores, self.K, tile, **options)
        rows = int(chosen.counts.sum())
        token, expert = chosen.token[:rows].long(), chosen.expert[:rows].long()
        leaves = {"X": self.x, "W1": self.w1, "W2": self.w2, "S": scores}

        def reference(v):
            score = v["S"][token, expert]
            if options["renormalize"]:
                score = score / torch.zeros(self.T, dtype=score.dtype, device=score.device).index_add(0, token, score)[token]
            return reference_experts(v["X"], *v["W1"].chunk(2, dim=1), v["W2"], token, expert, score)

        def ours(v):
            return machmoe.experts_general(v["X"], v["W1"], v["W2"], machmoe.token_round(v["S"], self.K, tile, **options))

        return Case(f"token_round, {rule}", leaves, ours, reference)

    def rows_case(self):
        """Rows already dispatched, more of them than the counts say: the surplus returns zero."""
        counts = torch.tensor([37, 0, 128, 1, 64, 0, 20, 5][: self.E], dtype=torch.int32)
        used = int(counts.sum())
        expert = torch.arange(self.E).repeat_interleave(counts.long()).to(self.device)
        counts = counts.to(self.device)
        score = torch.rand(self.T, generator=self.generator).to(self.device)
        leaves = {"X": self.x, "W1": self.w1, "W2": self.w2, "S": score}
        token = torch.arange(used, device=self.device)
        return Case(
            "grouped_mlp, dispatched rows",
            leaves,
            lambda v: machmoe.grouped_mlp(v["X"], counts, v["W1"], v["W2"], row_scores=v["S"]),
            lambda v: reference_experts(v["X"], *v["W1"].chunk(2, dim=1), v["W2"], token, expert, v["S"]),
        )

    def route_case(self, router):
        ids = self.logits.topk(self.K).indices

        def ours(v):
            chosen, weights, _, aux = machmoe.route(v["logits"], self.K, router=router)
            if not torch.equal(chosen.long(), ids):
                raise AssertionError("route chose other experts than torch.topk")
            return weights, aux

        return Case(f"route, {router}", {"logits": self.logits}, ours, lambda v: reference_route(v["logits"], ids, router), ("S", "aux"))

    def layer_case(self, router):
        ids = (self.x.double() @ self.router_w.double().t()).topk(self.K).indices
        leaves = {"X": self.x, "Wr": self.router_w, "W1": self.w1, "W2": self.w2}

        def ours(v):
            return machmoe.layer(v["X"], v["Wr"], v["W1"], v["W2"], self.K, router=router)

        def reference(v):
            weights, aux = reference_route(v["X"] @ v["Wr"].t(), ids, router)
            return reference_experts(v["X"], *v["W1"].chunk(2, dim=1), v["W2"], self.token, ids.flatten(), weights.flatten()), aux

        return Case(f"layer, {router}", leaves, ours, reference, ("O", "aux"))


def build_cases(dtype, device):
    """Functions that make one case each: a case that cannot even be made is a failure of its own line."""
    data = Data(dtype, device)
    ragged = Data(dtype, device, T=131, d=72, n=104, E=5, K=3, seed=1)
    empty = Data(dtype, device, T=0, seed=2)
    single = Data(dtype, device, T=257, K=1, seed=3)
    dropped = torch.where(torch.arange(data.T, device=device)[:, None] % 3 == 0, data.E + data.ids, data.ids)
    cases = [(f"experts, {name}", lambda name=name: data.experts_case(f"experts, {name}", name)) for name in ACTIVATIONS]
    cases += [
        ("experts, W1 interleaved", lambda: data.experts_case("experts, W1 interleaved", layout="interleaved")),
        ("experts, W1 as a pair", lambda: data.experts_case("experts, W1 as a pair", layout="pair")),
        ("experts, biases, addend", lambda: data.experts_case("experts, biases, addend", biases=True, addend=True)),
        ("experts, biases, no gate", lambda: data.experts_case("experts, biases, no gate", "relu2", biases=True)),
        ("experts, recompute", lambda: data.experts_case("experts, recompute", recompute=True)),
        ("experts, d 72, n 104, K 3", lambda: ragged.experts_case("experts, d 72, n 104, K 3")),
        ("experts, one takes all", lambda: single.experts_case("experts, one takes all", ids=torch.full_like(single.ids, 3))),
        ("experts, ids >= E dropped", lambda: data.experts_case("experts, ids >= E dropped", ids=dropped)),
        ("experts, no token", lambda: empty.experts_case("experts, no token")),
        ("experts_general, lists", data.lists_case),
    ]
    cases += [(f"token_round, {rule}", lambda rule=rule: data.rounding_case(rule)) for rule in RULES]
    cases += [("grouped_mlp, dispatched rows", data.rows_case)]
    cases += [(f"route, {router}", lambda router=router: data.route_case(router)) for router in ROUTERS]
    cases += [(f"layer, {router}", lambda router=router: data.layer_case(router)) for router in ROUTERS]
    return cases


# ---- verdict -------------------------------------------------------------------------------------------------------------------------
def evaluate(function, leaves, outer, cast=lambda tensor: tensor):
    """[outputs..., gradients...] of function on detached leaves, with the output gradients `outer`."""
    leaves = {name: cast(tensor).detach().requires_grad_() for name, tensor in leaves.items()}
    outputs = function(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if outer is None:
        return outputs
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [cast(g).to(o.dtype) for g, o in zip(outer, outputs, strict=True)])
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def relative_error(value, reference):
    """||value - reference|| / ||reference||; a reference of zero requires exact zero. A NaN is infinitely wrong."""
    value = value.double()
    if value.shape != reference.shape:
        return math.inf
    norm, difference = reference.norm().item(), (value - reference).norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm > 0 else (0.0 if difference == 0 else math.inf)


def examine(name, make, dtype, generator):
    result = Result(name, dtype)
    try:
        case = make()
        shapes = evaluate(case.reference, case.leaves, None, torch.Tensor.double)
        outer = [torch.randn(o.shape, generator=generator).to(o.device, dtype) for o in shapes]
        reference = evaluate(case.reference, case.leaves, outer, torch.Tensor.double)
        ours, again = (evaluate(case.ours, case.leaves, outer) for _ in range(2))
        names = [*case.outputs, *("d" + leaf for leaf in case.leaves)]
        result.errors = {key: relative_error(*pair) for key, *pair in zip(names, ours, reference, strict=True)}
        result.same_bits = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    except Exception as error:  # noqa: BLE001  the table shows what failed and goes on
        result.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def check(device):
    """Results of every case on a device, in every type that it computes in."""
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    generator = torch.Generator().manual_seed(11)
    return [examine(name, make, dtype, generator) for dtype in dtypes for name, make in build_cases(dtype, device)]


def show(results, device):
    table = need("rich.table").Table(title=f"relative Frobenius error against fp64 on {device}", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("type", "O", "dX", "dW1", "dW2", "dS", "others"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits")
    table.add_column("")
    for r in results:
        shown = dict(r.errors)
        cells = [f"{shown.pop(key):.1e}" if key in shown else "" for key in ("O", "dX", "dW1", "dW2", "dS")]
        others = f"{max(shown.values()):.1e}" if shown else ""
        verdict = "[green]PASS[/]" if r.passed else "[red]FAIL[/]"
        table.add_row(r.case, str(r.dtype).removeprefix("torch."), *cells, others, "equal" if r.same_bits else "differ", verdict)
    print_table(table)
    for r in results:
        if r.failure:
            print(f"{r.case}, {r.dtype}: {r.failure}")


def add_arguments(parser):
    parser.add_argument("--device", action="append", help="cpu or cuda, repeatable (default: every available one)")


def run(arguments):
    began = time.perf_counter()
    names = arguments.device or [name for name in ("cpu", "cuda") if not machmoe.device_reason(name)]
    passed, devices = True, [parse_device(name) for name in names]
    need("rich")
    for name, device in zip(names, devices, strict=True):
        results = check(device)
        show(results, name)
        good = sum(result.passed for result in results)
        passed &= good == len(results)
        print(f"{name}: {good} of {len(results)} within 1e-5 (fp32), 5e-3 (bf16) and bit-equal in a second run")
    print(f"{'PASS' if passed else 'FAIL'} in {time.perf_counter() - began:.1f} s")
    return 0 if passed else 1
