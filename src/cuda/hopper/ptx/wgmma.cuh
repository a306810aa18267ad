// Warpgroup matrix multiply (PTX ISA "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions") and its operand descriptors.
#pragma once
#include "device.cuh"
#include "wgmma_shapes.cuh"

namespace machmoe::cuda::hopper {

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// An operand under the 128-byte swizzle.
//   K-major tile [rows][64 bf16]:             lbo ignored, sbo = 1024 (8 rows); 16 further along K is 32 bytes, + 2 in the descriptor.
//   MN-major panels [64 of K][64 bf16 of MN]: lbo = bytes from panel to panel, sbo = 1024 (8 of K); 16 further along K is 2048 bytes, + 128.
DEV uint64_t desc_sw128(uint32_t addr, uint32_t lbo_bytes, uint32_t sbo_bytes) {
  return uint64_t((addr & 0x3FFFF) >> 4) | uint64_t(lbo_bytes >> 4) << 16 | uint64_t(sbo_bytes >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace machmoe::cuda::hopper
