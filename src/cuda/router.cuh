// Arithmetic of the routers: keys that order scores, and warp reductions in a fixed order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace machmoe::cuda {

constexpr unsigned kAllLanes = ~0u;

// Monotone in x, above 0; -0 ranks as 0 and NaN as infinity, as on the CPU.
__device__ inline uint32_t order_key(float x) {
  if (x != x) x = __int_as_float(0x7f800000);
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(kAllLanes, v, i);
  return v;
}
__device__ inline float warp_max(float v) {  // NaN wins
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, v, i);
    v = v > other || v != v ? v : other;
  }
  return v;
}

// The best of 32 kPerLane candidates, ties to the lower index; candidate j of a lane has index 32 j + lane. Key 0: none.
template <int kPerLane>
struct WarpSelect {
  uint32_t key[kPerLane];
  uint32_t best = 0;
  int best_j = 0;

  __device__ void rescan() {
    best = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; j++) {
      best_j = key[j] > best ? j : best_j;
      best = max(best, key[j]);
    }
  }
  // Takes the best candidate out and returns its index, the same in all lanes.
  __device__ int take(int lane) {
    const uint32_t top = __reduce_max_sync(kAllLanes, best);
    const unsigned index = __reduce_min_sync(kAllLanes, best == top ? static_cast<unsigned>(best_j * 32 + lane) : ~0u);
#pragma unroll
    for (int j = 0; j < kPerLane; j++) key[j] = static_cast<unsigned>(j * 32 + lane) == index ? 0u : key[j];
    rescan();
    return static_cast<int>(index);
  }
};

}  // namespace machmoe::cuda
