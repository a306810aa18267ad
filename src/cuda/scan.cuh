// Offsets and the work list from the experts' row counts, by one block for itself: every index kernel ends this way.
#pragma once
#include <cub/block/block_scan.cuh>

#include "cuda/work.h"

namespace machmoe::cuda {

constexpr int kIndexThreads = 1024;
constexpr int kItems = 4;   // experts of a thread: E <= kIndexThreads kItems

// Exclusive sums over the experts, in shared memory.
struct ExpertScan {
  int* rows;    // [E + 1] offsets
  int* tiles;   // [E + 1] 128-row tiles before the expert
  int* pairs;   // [E + 1] 256-row pairs before it
  __device__ static constexpr int ints(int E) { return 3 * (E + 1); }
  __device__ static ExpertScan carve(int* memory, int E) { return {memory, memory + (E + 1), memory + 2 * (E + 1)}; }
};

// count(e) -> rows of expert e. All threads of the block call it.
template <class Count> __device__ void scan_experts(const ExpertScan& scan, int E, Count count) {
  using Scan = cub::BlockScan<int, kIndexThreads>;
  __shared__ typename Scan::TempStorage storage;
  int rows[kItems], value[kItems], total;
  for (int i = 0; i < kItems; i++) {
    const int e = static_cast<int>(threadIdx.x) * kItems + i;
    rows[i] = e < E ? count(e) : 0;
  }
  auto sums = [&](int* out, auto of) {
    for (int i = 0; i < kItems; i++) value[i] = of(rows[i]);
    __syncthreads();
    Scan(storage).ExclusiveSum(value, value, total);
    for (int i = 0; i < kItems; i++) {
      const int e = static_cast<int>(threadIdx.x) * kItems + i;
      if (e < E) out[e] = value[i];
    }
    if (threadIdx.x == 0) out[E] = total;
  };
  sums(scan.rows, [](int r) { return r; });
  sums(scan.tiles, [](int r) { return (r + kTileRows - 1) / kTileRows; });
  sums(scan.pairs, [](int r) { return (r + kPairRows - 1) / kPairRows; });
  __syncthreads();
}

// The last e with before[e] <= i; entries without rows are skipped because later ones share their value.
__device__ inline int expert_of(const int* before, int E, int i) {
  int low = 0, high = E;   // before[low] <= i < before[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (before[middle] <= i) low = middle; else high = middle;
  }
  return low;
}

// This block's share of counts, offsets and the work list.
__device__ inline void write_work(const ExpertScan& scan, int E, int block, int blocks, int* counts, int* offsets, const WorkList& work) {
  const int first = block * kIndexThreads + static_cast<int>(threadIdx.x), step = blocks * kIndexThreads;
  for (int e = first; e <= E; e += step) {
    offsets[e] = scan.rows[e];
    if (counts && e < E) counts[e] = scan.rows[e + 1] - scan.rows[e];
  }
  auto write = [&](WorkTile* out, const int* before, int rows) {
    for (int i = first; i < before[E]; i += step) {
      const int e = expert_of(before, E, i), index = i - before[e];
      out[i] = {e, scan.rows[e] + index * rows, scan.rows[e + 1], index};
    }
  };
  write(work.tiles, scan.tiles, kTileRows);
  write(work.pairs, scan.pairs, kPairRows);
  if (first == 0) *work.header = {scan.pairs[E], scan.tiles[E], scan.rows[E], 0};
}

}  // namespace machmoe::cuda
