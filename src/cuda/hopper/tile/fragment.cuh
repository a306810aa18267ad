// bf16 pairs as stmatrix and ldmatrix move them, and where a lane's rows lie in a swizzled box.
// Accumulator of m64nN: lane l of warp w holds rows 16 w + l / 4 (d[4 j], d[4 j + 1]) and + 8 (d[4 j + 2], d[4 j + 3]), columns 8 j + 2 (l % 4) and + 1.
#pragma once
#include "cuda/hopper/ptx/device.cuh"

namespace machmoe::cuda::hopper {

DEV uint32_t pack(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
DEV float2 unpack(uint32_t v) { return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)}; }
// The same where it is written: moved out of a loop, the unpacked pairs would need twice the registers.
DEV float2 unpack_here(uint32_t v) {
  float2 f;
  asm volatile("{\n.reg .b32 t;\nshl.b32 t, %2, 16;\nmov.b32 %0, t;\nand.b32 t, %2, 0xFFFF0000;\nmov.b32 %1, t;\n}" : "=f"(f.x), "=f"(f.y) : "r"(v));
  return f;
}

// The 128-byte swizzle: byte offset of 16-byte chunk `chunk` of row `row` in a box whose rows are 128 bytes. 8 rows of a column lie in different banks.
DEV uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
// stmatrix_x4 of column blocks j and j + 1 (8 columns each) of 16 rows: matrices (rows low, j), (high, j), (low, j + 1), (high, j + 1).
// Byte offset of the row that this lane addresses, in a box of 64 columns.
DEV uint32_t matrix_offset(int lane, int j) { return swizzled(lane & 15, j + (lane >> 4)); }

}  // namespace machmoe::cuda::hopper
