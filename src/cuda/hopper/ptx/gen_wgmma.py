"""Writes wgmma_shapes.cuh: wgmma.mma_async m64nNk16, fp32 += bf16 x bf16, both operands from shared memory."""

import sys
import textwrap


def wrapped(items, indent):
    return textwrap.fill(", ".join(items), 140, initial_indent=indent, subsequent_indent=indent)


def mma(n):
    count = n // 2
    registers = "\n".join(f'        "{line.strip()} "' for line in wrapped([f"%{i}" for i in range(count)], "").splitlines())
    outputs = wrapped([f'"+f"(d[{i}])' for i in range(count)], "          ").strip()
    return f"""template <int kTransA, int kTransB> struct Wgmma<{n}, kTransA, kTransB> {{
  DEV static void mma(float (&d)[{count}], uint64_t a, uint64_t b, int scale_d) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\nwgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"
{registers}
        "}}, %{count}, %{count + 1}, p, 1, 1, %{count + 3}, %{count + 4};\\n}}"
        : {outputs}
        : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB));
  }}
}};"""


shapes = "\n".join(mma(n) for n in (64, 128, 192, 256))
open(sys.argv[1], "w").write(f"""// Written by gen_wgmma.py.
#pragma once
#include "device.cuh"

namespace machmoe::cuda::hopper {{

// d (64 x N) = a b + (scale_d ? d : 0). kTransA, kTransB: 0 = the operand is K-major, 1 = MN-major.
template <int N, int kTransA, int kTransB> struct Wgmma;
{shapes}

}}  // namespace machmoe::cuda::hopper
""")
