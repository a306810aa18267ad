// Sums over a block; offsets and the work lists from the experts' row counts, by one block for itself: every index kernel has blocks for it.
#pragma once
#include "cuda/kernels.h"
#include "cuda/work.h"

namespace machmoe::cuda {

constexpr int kIndexThreads = 1024;
// Blocks that write the work lists beside those that write the rows; the list of experts takes E^2 comparisons.
__host__ __device__ constexpr int work_blocks(int64_t E) { return E <= 512 ? 4 : static_cast<int>(E / 128); }

template <class T>
__device__ T warp_inclusive_sum(T value) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const T before = __shfl_up_sync(~0u, value, i);
    if (threadIdx.x % 32 >= i) value += before;
  }
  return value;
}
// The sum over the warp. A 64-bit value holds two sums below 2^31, in its halves: nothing is carried from one to the other.
template <class T>
__device__ T warp_total(T value) {
  if constexpr (sizeof(T) == 4) return __reduce_add_sync(~0u, value);
  else
    return static_cast<T>(uint64_t{__reduce_add_sync(~0u, static_cast<unsigned>(value >> 32))} << 32 |
                          __reduce_add_sync(~0u, static_cast<unsigned>(value)));
}
// The sum over the threads of the block before this one, of 64-bit values as above. All threads of the block call it.
template <class T>
__device__ T exclusive_sum(T value, T& total) {
  __shared__ T parts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T own = warp_inclusive_sum(value);
  __syncthreads();  // the parts of the call before have been read
  if (lane == 31) parts[warp] = own;
  __syncthreads();
  const T part = lane < blockDim.x / 32 ? parts[lane] : T{0};
  total = warp_total(part);
  return warp_total(lane < warp ? part : T{0}) + own - value;
}
// The sum over the warps of the block before this one, and over this one. All threads of the block call it.
__device__ inline int sum_of_earlier_warps(int value, int& of_warp) {
  __shared__ int parts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  of_warp = warp_total(value);
  __syncthreads();  // the parts of the call before have been read
  if (lane == 0) parts[warp] = of_warp;
  __syncthreads();
  return warp_total(lane < warp ? parts[lane] : 0);
}
__device__ inline int block_sum(int value) {
  int total;
  exclusive_sum(value, total);
  return total;
}

// Exclusive sums over the experts, in shared memory; entry E is the total.
struct ExpertScan {
  int* rows;   // [E + 1] offsets
  int* tiles;  // [E + 1] 128-row tiles before the expert
  int* even;   // [E + 1] of these the ones of experts with an even number

  static constexpr int64_t ints(int64_t E) { return 3 * (E + 1); }
  __device__ ExpertScan(int* memory, int E) : rows(memory), tiles(rows + (E + 1)), even(tiles + (E + 1)) {}

  // count(e) -> rows of expert e; rows past R_cap are cut off. All threads of the block call it; `count` may read the memory of tiles.
  template <int kThreads = kIndexThreads, class Count>
  __device__ void run(int E, int64_t R_cap, Count count) {
    constexpr int kMaxOwn = kMaxExperts / kThreads;
    const int owned = (E + kThreads - 1) / kThreads, first = static_cast<int>(threadIdx.x) * owned, limit = static_cast<int>(R_cap);
    int number[kMaxOwn];
    const auto each = [&](auto f) {  // f(number of an expert, expert) of those that the thread owns
#pragma unroll
      for (int i = 0; i < kMaxOwn; i++) {
        if (i == owned) break;
        f(number[i], first + i);
      }
    };
    // Counts that come from outside may add up to more than 2^31; what lies past the limit does not matter. A sum goes in two parts, of 15 and 16 bits.
    int64_t sum = 0;
    each([&](int& n, int e) { sum += n = e < E ? count(e) : 0; });
    const auto whole = [](uint64_t parts) { return static_cast<int64_t>(parts >> 32 << 16) + static_cast<uint32_t>(parts); };
    const auto own = static_cast<uint64_t>(min(sum, static_cast<int64_t>(limit)));
    uint64_t total;
    int64_t before = whole(exclusive_sum(own >> 16 << 32 | (own & 0xffff), total));
    each([&](int& n, int e) {
      const int here = static_cast<int>(min(before, static_cast<int64_t>(limit)));
      if (e < E) rows[e] = here;
      before += n;
      n = min(n, limit - here);
    });
    const auto tiles_of = [](int n) {  // both sums in one
      const int count = (n + kTileRows - 1) / kTileRows;
      return static_cast<uint64_t>(count % 2 == 0 ? count : 0) << 32 | static_cast<unsigned>(count);
    };
    uint64_t both = 0, all;
    each([&](int n, int) { both += tiles_of(n); });
    both = exclusive_sum(both, all);
    each([&](int n, int e) {
      if (e < E) tiles[e] = static_cast<int>(both), even[e] = static_cast<int>(both >> 32);
      both += tiles_of(n);
    });
    if (threadIdx.x == 0)
      rows[E] = static_cast<int>(min(whole(total), static_cast<int64_t>(limit))), tiles[E] = static_cast<int>(all),
      even[E] = static_cast<int>(all >> 32);
    __syncthreads();
  }
  // Where the tiles of expert e begin in the list of tiles of work.h.
  __device__ int place(int e, int E) const { return (tiles[e + 1] - tiles[e]) % 2 == 0 ? even[e] : even[E] + tiles[e] - even[e]; }
};

// The e with before[e] <= i < before[e + 1].
__device__ inline int expert_of(const int* before, int E, int i) {
  int low = 0, high = E;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (before[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

// One block's share of counts (unless null), offsets and the work lists.
template <int kThreads = kIndexThreads>
__device__ void write_work(const ExpertScan& scan, int E, int block, int blocks, int* counts, int* offsets, const WorkList& work) {
  const int first = block * kThreads + static_cast<int>(threadIdx.x), step = blocks * kThreads;
  for (int e = first; e <= E; e += step) {
    offsets[e] = scan.rows[e];
    if (counts && e < E) counts[e] = scan.rows[e + 1] - scan.rows[e];
  }
  for (int i = first; i < scan.tiles[E]; i += step) {
    const int e = expert_of(scan.tiles, E, i), index = i - scan.tiles[e];
    work.tiles[scan.place(e, E) + index] = {e, scan.rows[e] + index * kTileRows, scan.rows[e + 1]};
  }
  const int lane = threadIdx.x % 32;
  int with_rows = 0;
  for (int e = first / 32; e < E; e += step / 32) {  // a warp finds how many experts stand before one
    const int own = scan.rows[e + 1] - scan.rows[e];
    int before = 0;
    for (int i = lane; i < E; i += 32) before += scan.rows[i + 1] - scan.rows[i] + (i < e) > own;
    before = __reduce_add_sync(~0u, before);
    if (lane == 0) work.experts[before] = {e, scan.rows[e], scan.rows[e + 1]};
  }
  if (first >= 32) return;
  for (int i = lane; i < E; i += 32) with_rows += scan.rows[i + 1] > scan.rows[i];
  with_rows = __reduce_add_sync(~0u, with_rows);
  if (first == 0) *work.header = {scan.tiles[E], scan.rows[E], with_rows};
}

// What stands in the rows past R.
__device__ inline void clear_row(const Routing& r, int64_t row) {
  (r.slot ? r.slot : r.token)[row] = 0;
  if (r.score && !r.slot) static_cast<float*>(r.score)[row] = 0.f;
  if (r.expert) r.expert[row] = 0;
}

}  // namespace machmoe::cuda
