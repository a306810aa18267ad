"""Shapes that are measured, their arithmetic, and the floor of the hardware."""

import math
from dataclasses import dataclass, replace

from ..errors import UserError


@dataclass(frozen=True)
class Shape:
    name: str
    T: int
    d: int
    n: int
    E: int
    K: int

    @property
    def rows(self):
        return self.T * self.K

    def flops(self, rows=None):
        """Of the forward; the backward has twice as many. Padding and recomputation do not count."""
        return 6 * (rows or self.rows) * self.n * self.d

    def aligned(self, tile=128):
        """The shape at the nearest K, the lower one of two, that gives every expert of balanced routing whole tiles."""
        whole = [k for k in range(1, self.E + 1) if self.T * k % (self.E * tile) == 0]
        if not whole:
            raise UserError(f"no K gives each of {self.E} experts whole tiles of {tile} of {self.T} tokens: take another T")
        return replace(self, K=min(whole, key=lambda k: abs(k - self.K)))


def _shape(name, *sizes):
    return name, Shape(name, *sizes)


# T, d, n, E, K
SHAPES = dict(
    [
        _shape("cpu", 4096, 512, 256, 32, 4),
        _shape("30B-n1024-K4", 32768, 4096, 1024, 64, 4),
        _shape("30B-n512-K8", 32768, 4096, 512, 128, 8),
        _shape("30B-n256-K16", 32768, 4096, 256, 256, 16),
        _shape("7B-n1024-K2", 24576, 1536, 1024, 32, 2),
        _shape("7B-n512-K4", 24576, 1536, 512, 64, 4),
        _shape("7B-n256-K8", 24576, 1536, 256, 128, 8),
        _shape("1.4B-n256-K8", 40960, 768, 256, 128, 8),
        _shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8),
        _shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
        _shape("Qwen3-Next-80B", 32768, 2048, 512, 512, 10),
        _shape("gpt-oss-20b", 32768, 2880, 2880, 32, 4),
        _shape("DeepSeek-V3", 16384, 7168, 2048, 256, 8),
    ]
)
H200_SHAPES = [name for name in SHAPES if name != "cpu"]

# Of one H200, measured: dense bf16 products and a device copy.
PEAK_FLOPS = 790e12
PEAK_BYTES = 4.3e12


def parse(text):
    """A name of SHAPES, or the sizes T,H,I,E,K."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
        raise UserError(f"'{text}' is no shape: give T,H,I,E,K with K <= E, or one of {', '.join(SHAPES)}")
    return Shape("x".join(map(str, sizes)), *sizes)


def floor_ms(shape, backward):
    """Sum over the kernels of max(FLOPs / peak, bytes / peak), each operand moved once, bf16."""
    T, d, n, E, R = shape.T, shape.d, shape.n, shape.E, shape.rows
    token, rows, h, a, w1, w2 = 2 * T * d, 2 * R * d, 4 * R * n, 2 * R * n, 4 * E * n * d, 2 * E * n * d
    forward_kernels = [
        (4 * R * n * d, token + w1 + h + a),  # H = gather(X) W1^T, A
        (2 * R * n * d, a + w2 + rows),  # Y = A W2^T
        (0, rows + token),  # O
    ]
    backward_kernels = [
        (2 * R * n * d, token + w2 + h + h + a),  # dH, A'
        (2 * R * n * d, token + a + w2),  # dW2
        (4 * R * n * d, h + w1 + rows),  # dX~
        (4 * R * n * d, token + h + w1),  # dW1
        (0, rows + token),  # dX
    ]
    return 1e3 * math.fsum(max(flops / PEAK_FLOPS, size / PEAK_BYTES) for flops, size in (backward_kernels if backward else forward_kernels))
