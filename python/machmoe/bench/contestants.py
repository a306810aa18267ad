"""Who is measured. Each contestant is a function of its leaves to O, differentiable: forward and backward are timed alike for all."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..torch_layer import grouped_experts, topk_route


class Problem:
    """Random data of unit variance and one routing. Patterns: random top-K, balanced (random tokens), aligned (balanced at the nearest K that gives
    whole tiles), skewed (p_e ~ 1 / the place of e in a random order), rounded (token rounding).
    like: another problem of the shape, whose data it shares."""

    def __init__(self, shape, pattern, dtype, device, seed=0, like=None):
        self.shape, self.pattern = shape.aligned() if pattern == "aligned" else shape, pattern
        T, d, n, E, K = shape.T, shape.d, shape.n, shape.E, self.shape.K
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*sizes, scale=1.0):
            return torch.empty(sizes, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        if like:
            self.x, self.d_o, self.w1, self.w2, self.router_w = like.x, like.d_o, like.w1, like.w2, like.router_w
        else:
            self.x, self.d_o = normal(T, d), normal(T, d)
            self.w1, self.w2, self.router_w = normal(E, 2 * n, d, scale=d**-0.5), normal(E, d, n, scale=n**-0.5), normal(E, d, scale=d**-0.5)
        generator.manual_seed(seed + 1)  # the same scores for every pattern
        logits = torch.randn(T, E, device=device, generator=generator)
        if pattern == "skewed":  # Gumbel top-K of log p_e: K experts without replacement
            uniform = torch.rand(T, E, device=device, generator=generator).clamp_(1e-12, 1 - 1e-7)
            place = 1 + torch.randperm(E, device=device, generator=generator)
            logits = -place.float().log() - (-uniform.log()).log()
        self.scores = logits.softmax(-1)
        if pattern in ("balanced", "aligned"):
            order, tokens = (torch.randperm(size, device=device, generator=generator) for size in (E, T))
            ids = order[(tokens.unsqueeze(1) * K + torch.arange(K, device=device)) % E]
            self.weights = self.scores.gather(1, ids)
        else:
            self.weights, ids = self.scores.topk(K)
        self.weights /= self.weights.sum(-1, keepdim=True)
        self.ids = ids.int()
        self.rows = self.shape.rows


class Contestant:
    """forward() -> O with its graph; backward(O) -> gradients of the leaves. `layer` is the same from the router product on, or None."""

    def __init__(self, problem):
        self.problem = problem

        def leaf(tensor):
            return tensor.detach().requires_grad_()

        self.x, self.w1, self.w2, self.weights = leaf(problem.x), leaf(problem.w1), leaf(problem.w2), leaf(problem.weights)
        self.router_w = leaf(problem.router_w)
        self.rows = problem.rows
        if problem.pattern != "random":
            self.layer = None  # its router would choose, not the pattern
        self.prepare()

    def prepare(self):
        pass

    def leaves(self):
        return self.x, self.w1, self.w2, self.weights

    def layer_leaves(self):
        return self.x, self.w1, self.w2, self.router_w

    layer = None

    def backward(self, o):
        return torch.autograd.grad(o, self.leaves(), self.problem.d_o)

    def layer_backward(self, o):
        return torch.autograd.grad(o, self.layer_leaves(), self.problem.d_o)


class Machmoe(Contestant):
    def prepare(self):
        import machmoe

        self.machmoe = machmoe
        if self.problem.pattern == "rounded":
            self.scores = self.problem.scores.detach().requires_grad_()
            self.rows = int(self.routing().counts.sum())

    def routing(self):
        return self.machmoe.token_round(self.scores, self.problem.shape.K, 128, renormalize=True)

    def leaves(self):
        return (self.x, self.w1, self.w2, self.scores if self.problem.pattern == "rounded" else self.weights)

    def forward(self):
        if self.problem.pattern == "rounded":
            return self.machmoe.experts_general(self.x, self.w1, self.w2, self.routing())
        return self.machmoe.experts(self.x, self.w1, self.w2, self.problem.ids, self.weights)

    def layer(self):
        o, _aux = self.machmoe.layer(self.x, self.router_w, self.w1, self.w2, self.problem.shape.K, router="softmax_topk_norm")
        return o


class GroupedMM(Contestant):
    """torch's grouped_mm, eager; saves what autograd wants."""

    experts = staticmethod(grouped_experts)

    def forward(self):
        return self.experts(self.x, self.w1, self.w2, self.problem.ids, self.weights)

    def layer(self):
        ids, weights, _ = topk_route(self.x @ self.router_w.t(), self.problem.shape.K)
        return self.experts(self.x, self.w1, self.w2, ids, weights)


def compiled(function):
    """One compilation for each shape that comes, however many there are."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False)


class GroupedMMCompiled(GroupedMM):
    def prepare(self):
        self.experts = compiled(grouped_experts)


def glu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def glu_backward(h, d_a):
    gate, up = (plane.float() for plane in h.chunk(2, dim=-1))
    d_a, sigmoid = d_a.float(), gate.sigmoid()
    silu = gate * sigmoid
    d_gate = d_a * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((d_gate, d_a * silu), dim=-1).to(h.dtype), (silu * up).to(h.dtype)


class DenseFunction(Function):
    """Both passes of a balanced layer whose rows were gathered beforehand, without scores."""

    @staticmethod
    def forward(ctx, x, w1, w2, rival):
        T, K = rival.problem.shape.T, rival.problem.shape.K
        h = torch.bmm(rival.x_rows, w1.transpose(1, 2))
        y = torch.bmm(rival.glu(h), w2.transpose(1, 2))
        ctx.rival = rival
        ctx.save_for_backward(h, w1, w2)
        return y.view(K, T, -1).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o):
        rival, (h, w1, w2) = ctx.rival, ctx.saved_tensors
        T, K = rival.problem.shape.T, rival.problem.shape.K
        d_h, a = rival.glu_backward(h, torch.bmm(rival.d_o_rows, w2))
        d_w2 = torch.bmm(rival.d_o_rows.transpose(1, 2), a)
        d_x = torch.bmm(d_h, w1).view(K, T, -1).sum(0)
        d_w1 = torch.bmm(d_h.transpose(1, 2), rival.x_rows)
        return d_x, d_w1, d_w2, None


class Dense(Contestant):
    """The yardstick: the same FLOPs as torch.bmm of equal batches, no routing. The SwiGLU is fused by torch.compile on CUDA."""

    def prepare(self):
        shape = self.problem.shape
        if shape.rows % shape.E:
            raise ValueError(f"T K = {shape.rows} is not divisible by E = {shape.E}")

        def gathered(tensor):
            return tensor.repeat(shape.K, 1).view(shape.E, shape.rows // shape.E, shape.d)

        self.x_rows, self.d_o_rows = gathered(self.problem.x), gathered(self.problem.d_o)
        on_cuda = self.x.is_cuda
        self.glu, self.glu_backward = (compiled(glu), compiled(glu_backward)) if on_cuda else (glu, glu_backward)

    def leaves(self):
        return self.x, self.w1, self.w2

    def forward(self):
        return DenseFunction.apply(self.x, self.w1, self.w2, self)


class SonicMoE(Contestant):
    """The official package (sonic-moe on quack-kernels), where it is installed: its metadata, up- and down-projection."""

    def prepare(self):
        from sonicmoe import functional
        from sonicmoe.enums import ActivationType

        self.functional, self.activation = functional, ActivationType.SWIGLU
        E, n2, d = self.w1.shape
        self.w1 = torch.stack(self.w1.detach().chunk(2, 1), 2).reshape(E, n2, d).requires_grad_()  # it wants gate and up rows alternating

    def forward(self):
        shape, rows = self.problem.shape, self.problem.shape.rows
        count, offset, gather, scatter, reverse = (
            torch.empty(size, dtype=torch.int32, device=self.x.device) for size in (shape.E, shape.E + 1, rows, rows, rows)
        )
        self.functional.TC_topk_router_metadata_triton(self.problem.ids, shape.E, count, offset, gather, scatter, reverse)
        w1, w2 = self.w1.permute(1, 2, 0), self.w2.permute(1, 2, 0)
        tail = shape.K, gather, scatter, reverse, None, False, self.activation
        a, h = self.functional._UpProjection.apply(self.x, w1, None, offset, rows, *tail, False, False)
        return self.functional._DownProjection.apply(a, h, w2, None, self.weights, offset, shape.T, *tail)


CONTESTANTS = {"machmoe": Machmoe, "dense bmm": Dense, "grouped_mm": GroupedMM, "grouped_mm+compile": GroupedMMCompiled, "sonic-moe": SonicMoE}
