// Arithmetic of the routers: keys that order scores, and warp reductions in a fixed order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
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
// Every lane sorts its own once; then the best of all is the best of the lanes' first.
template <int kPerLane>
struct WarpSelect {
  uint32_t key[kPerLane];
  int index[kPerLane];

  // Adjacent transpositions: equal keys keep their order.
  __device__ void sort(int lane) {
#pragma unroll
    for (int j = 0; j < kPerLane; j++) index[j] = j * 32 + lane;
#pragma unroll
    for (int round = 0; round < kPerLane; round++)
#pragma unroll
      for (int j = round % 2; j + 1 < kPerLane; j += 2) {
        const bool swap = key[j] < key[j + 1];
        const uint32_t high = swap ? key[j + 1] : key[j];
        const int first = swap ? index[j + 1] : index[j];
        key[j + 1] = swap ? key[j] : key[j + 1];
        index[j + 1] = swap ? index[j] : index[j + 1];
        key[j] = high;
        index[j] = first;
      }
  }
  // Takes the best candidate out and returns its index, the same in all lanes.
  __device__ int take() {
    const uint32_t top = __reduce_max_sync(kAllLanes, key[0]);
    const unsigned holders = __ballot_sync(kAllLanes, key[0] == top);
    const int best = holders & (holders - 1) ? __reduce_min_sync(kAllLanes, key[0] == top ? index[0] : INT_MAX)
                                             : __shfl_sync(kAllLanes, index[0], __ffs(holders) - 1);
    const bool mine = key[0] == top && index[0] == best;
#pragma unroll
    for (int j = 0; j + 1 < kPerLane; j++) {
      key[j] = mine ? key[j + 1] : key[j];
      index[j] = mine ? index[j + 1] : index[j];
    }
    key[kPerLane - 1] = mine ? 0u : key[kPerLane - 1];
    return best;
  }
};

}  // namespace machmoe::cuda
