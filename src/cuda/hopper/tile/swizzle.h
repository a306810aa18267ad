// The layouts of the tensor copy engine: 16-byte chunks of a row are permuted within repeating groups of rows, so that 8 rows of a column lie in
// different banks. Rows of 128 bytes: chunk ^ row % 8. Rows of 64 bytes: chunk ^ row / 2 % 4. Other rows lie as they are; an odd number of chunks
// (176 bytes) spreads over the banks by itself.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MACHMOE_SWIZZLE_HD __host__ __device__ __forceinline__
#else
#define MACHMOE_SWIZZLE_HD inline
#endif

namespace machmoe::cuda::hopper {

// Byte offset of 16-byte chunk `chunk` of row `row` in a box whose rows are row_bytes wide.
MACHMOE_SWIZZLE_HD constexpr uint32_t swizzled(uint32_t row, uint32_t chunk, uint32_t row_bytes) {
  return row * row_bytes + ((chunk ^ (row_bytes == 128 ? row & 7 : row_bytes == 64 ? (row >> 1) & 3 : 0)) << 4);
}

}  // namespace machmoe::cuda::hopper
