// Arithmetic of the routers: keys that order scores, and warp reductions in a fixed order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

#include "cuda/math.cuh"

namespace machmoe::cuda {

constexpr unsigned kAllLanes = ~0u;

// Monotone in x, above 0; -0 ranks as 0 and NaN as infinity, as on the CPU.
__device__ inline uint32_t order_key(float x) {
  const int bits = __float_as_int(fminf(x, __int_as_float(0x7f800000)) + 0.f);  // the minimum of NaN and a number is the number
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT_MIN));
}
__device__ inline float value_of(uint32_t order_key) {
  const int key = static_cast<int>(order_key);
  return __int_as_float(key ^ (~(key >> 31) | INT_MIN));
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

// e^x for x <= 0 by the special function unit: relative error below 1e-6 where the result matters (x > -10), 0 below 2^-126.
__device__ inline float exp_of(float x) { return exp2_approx(x * 1.442695041f); }

// n - (a < b), by the borrow of a subtraction: the compiler needs one instruction more for it.
__device__ inline void drop_if_less(int& n, uint32_t a, uint32_t b) {
  asm("{.reg .u32 t; sub.cc.u32 t, %1, %2; subc.u32 %0, %0, 0;}" : "+r"(n) : "r"(a), "r"(b));
}
__device__ inline void drop_if_less(int& n, uint64_t a, uint64_t b) {
  asm("{.reg .u64 t; sub.cc.u64 t, %1, %2; subc.u32 %0, %0, 0;}" : "+r"(n) : "l"(a), "l"(b));
}

// One of the best K keys of a warp, in any lane; rank < K says that the lane has one.
struct Selected {
  uint32_t key;
  int index, rank;
};
constexpr int kMaxSelected = 16;  // K of rank_candidates

// The best K of 32 kPerLane keys, ties to the lower index. A lane has kWidth neighbouring ones, then those 32 kWidth further on; with kWidth 1, key[j] has
// index 32 j + lane. Key 0: none, and at least K are others.
// The K-th largest of the lanes' own best keys is a bound that few more than K keys reach. Those move to one lane each and count how many are better.
// All lanes of the warp call both; `memory` is the warp's own.
struct Candidates {
  uint32_t bound;
  int own, total;  // keys of the lane, of the warp that reach it: K or more
};
template <int kPerLane>
__device__ Candidates find_candidates(const uint32_t (&key)[kPerLane], int K, int lane) {
  uint32_t best = key[0];
#pragma unroll
  for (int j = 1; j < kPerLane; j++) best = max(best, key[j]);
  uint32_t head = (best & ~31u) | (31u - lane);  // different in every lane
  uint32_t bound;
  int left = K;
#pragma unroll 1
  do {  // an odd K takes one more: a lower bound
    bound = __reduce_max_sync(kAllLanes, head);
    head = head == bound ? 0u : head;
    bound = __reduce_max_sync(kAllLanes, head);
    head = head == bound ? 0u : head;
    left -= 2;
  } while (left > 0);
  bound = max(bound & ~31u, 1u);

  int own = kPerLane;
#pragma unroll
  for (int j = 0; j < kPerLane; j++) drop_if_less(own, key[j], bound);
  return {bound, own, static_cast<int>(__reduce_add_sync(kAllLanes, own))};
}
template <int kWidth, int kPerLane>
__device__ Selected rank_candidates(const Candidates& found, const uint32_t (&key)[kPerLane], int K, int lane, ulonglong2 (&memory)[16]) {
  const auto [bound, own, total] = found;
  const auto index_of = [&](int j) { return (j / kWidth * 32 + lane) * kWidth + j % kWidth; };
  if (total > 32) {  // many equal keys: K times the best after the last one
    Selected mine{0, 0, kMaxSelected};
    uint32_t last = ~0u;
    int last_index = -1;
#pragma unroll 1
    for (int k = 0; k < K; k++) {
      uint32_t next = 0;
      int index = INT_MAX;
#pragma unroll
      for (int j = 0; j < kPerLane; j++) {
        const int i = index_of(j);
        if (key[j] > next && (key[j] < last || (key[j] == last && i > last_index))) next = key[j], index = i;
      }
      last = __reduce_max_sync(kAllLanes, next);
      last_index = __reduce_min_sync(kAllLanes, next == last ? index : INT_MAX);
      if (lane == k) mine = {last, last_index, k};
    }
    return mine;
  }
  auto* const candidates = reinterpret_cast<uint64_t*>(memory);
  int place = own;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int before = __shfl_up_sync(kAllLanes, place, i);
    place += lane >= i ? before : 0;
  }
  uint64_t* to = candidates + (place - own);
  candidates[lane] = 0;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; j++)
    if (key[j] >= bound) *to++ = uint64_t{key[j]} << 32 | ~static_cast<unsigned>(index_of(j));
  __syncwarp();
  const uint64_t mine = candidates[lane];
  int better = 0;  // below 0
  const ulonglong2 *others = memory, *end = memory + (total + 1) / 2;
#pragma unroll 1
  do {
    const ulonglong2 a = others[0], b = others[1];
    drop_if_less(better, mine, a.x);
    drop_if_less(better, mine, a.y);
    drop_if_less(better, mine, b.x);
    drop_if_less(better, mine, b.y);
    others += 2;
  } while (others < end);
  __syncwarp();
  return {static_cast<uint32_t>(mine >> 32), static_cast<int>(~static_cast<unsigned>(mine)), -better};
}

}  // namespace machmoe::cuda
