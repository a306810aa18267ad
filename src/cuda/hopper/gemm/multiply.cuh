// The product of a consumer warpgroup over one stage of the ring.
#pragma once
#include "cuda/hopper/gemm/ring.cuh"

namespace machmoe::cuda::hopper {

// 64 rows x N columns. a, b: shared-memory addresses. kPanelsA, kPanelsB: the operand lies in MN-major panels instead of K-major rows.
template <int N, bool kPanelsA, bool kPanelsB, int kAccumulators>
DEV void multiply(float (&acc)[kAccumulators], uint32_t a, uint32_t b, bool accumulate) {
  const uint64_t da = desc_sw128(a, kPanelsA ? kPanelBytes : 16, 1024), db = desc_sw128(b, kPanelsB ? kPanelBytes : 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / 16; k++)
    Wgmma<N, kPanelsA, kPanelsB>::mma(*reinterpret_cast<float(*)[N / 2]>(&acc[0]), da + (kPanelsA ? 128 : 2) * k, db + (kPanelsB ? 128 : 2) * k,
                                      accumulate || k > 0);
  wgmma_commit();
}

}  // namespace machmoe::cuda::hopper
