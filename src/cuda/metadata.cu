// Routing metadata: a stable counting sort of the slots by expert. No host sync; integer counters alone, so bits never depend on timing.
//   top-K   two launches: histogram of each block's slots; scan and scatter
//   lists   one cooperative launch: pairs are first put in (token, expert) order, which makes them the slots of the same sort
//   rows    one launch: offsets and the work list from counts
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "core/workspace.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/scan.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kWarps = kIndexThreads / 32;
constexpr int kPerLane = 4;                                 // slots of a lane
constexpr int kBlockSlots = kIndexThreads * kPerLane;       // slots of a block, in order of warps
constexpr int kWarpSlots = 32 * kPerLane;

int64_t blocks_of(int64_t slots) { return std::max<int64_t>(1, (slots + kBlockSlots - 1) / kBlockSlots); }

// Counters of one expert in one warp hold at most 128: a byte.
size_t sort_smem(int64_t E) { return static_cast<size_t>(kWarps * ((E + 3) / 4 * 4)) + sizeof(int) * static_cast<size_t>(3 * (E + 1) + 2 * E); }

struct SortParams {
  int64_t slots;
  int E;
  int* histogram;   // [blocks][E]
  Routing out;
  WorkList work;
  int* order;       // optional
};

// The ids of this lane's slots (an id >= E, or a negative one, becomes E: dropped) and their ranks among the equal ids of the warp.
template <class Id> struct WarpSlots {
  int expert[kPerLane], rank[kPerLane];
  __device__ WarpSlots(const SortParams& p, const Id* ids, int64_t first, uint8_t* counters) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < kPerLane; i++) {
      const int64_t slot = first + i * 32 + lane;
      const uint64_t id = slot < p.slots ? static_cast<uint64_t>(static_cast<int64_t>(ids[slot])) : ~uint64_t{0};
      expert[i] = id < static_cast<uint64_t>(p.E) ? static_cast<int>(id) : p.E;
      const unsigned same = __match_any_sync(~0u, expert[i]);
      const int below = __popc(same & ((1u << lane) - 1));
      const int before = expert[i] < p.E ? counters[expert[i]] : 0;
      __syncwarp();
      if (below == 0 && expert[i] < p.E) counters[expert[i]] = static_cast<uint8_t>(before + __popc(same));
      __syncwarp();
      rank[i] = before + below;
    }
  }
};

struct SortMemory {
  uint8_t* counters;   // [kWarps][pitch]
  int pitch;
  ExpertScan scan;
  int *before, *total; // [E] rows of earlier blocks; of all blocks
  __device__ SortMemory(int E, int* memory) : pitch((E + 3) / 4 * 4) {
    scan = ExpertScan::carve(memory, E);
    before = memory + ExpertScan::ints(E);
    total = before + E;
    counters = reinterpret_cast<uint8_t*>(total + E);
  }
};
extern __shared__ int shared_memory[];

template <class Id> __device__ WarpSlots<Id> count_slots(const SortParams& p, const SortMemory& m, const Id* ids, int block) {
  for (int i = threadIdx.x; i < kWarps * m.pitch / 4; i += kIndexThreads) reinterpret_cast<int*>(m.counters)[i] = 0;
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const WarpSlots<Id> slots(p, ids, int64_t{block} * kBlockSlots + warp * kWarpSlots, m.counters + warp * m.pitch);
  __syncthreads();
  return slots;
}
template <class Id> __device__ void histogram_phase(const SortParams& p, const SortMemory& m, const Id* ids, int block) {
  count_slots(p, m, ids, block);
  for (int e = threadIdx.x; e < p.E; e += kIndexThreads) {
    int sum = 0;
    for (int w = 0; w < kWarps; w++) sum += m.counters[w * m.pitch + e];
    p.histogram[int64_t{block} * p.E + e] = sum;
  }
  __syncthreads();
}

// Sums the histograms of all blocks, by groups of threads that take every groups-th block each.
__device__ inline void sum_histograms(const SortParams& p, const SortMemory& m, int block, int blocks) {
  for (int e = threadIdx.x; e < p.E; e += kIndexThreads) m.before[e] = m.total[e] = 0;
  __syncthreads();
  const int width = min((p.E + 31) / 32 * 32, kIndexThreads), groups = kIndexThreads / width, group = threadIdx.x / width;
  for (int e = threadIdx.x % width; e < p.E && group < groups; e += width) {
    int before = 0, total = 0;
#pragma unroll 8
    for (int b = group; b < blocks; b += groups) {
      const int n = p.histogram[int64_t{b} * p.E + e];
      total += n;
      before += b < block ? n : 0;
    }
    atomicAdd(m.before + e, before);
    atomicAdd(m.total + e, total);
  }
  __syncthreads();
}

// put(slot, row, expert) for every kept slot of this block, drop(slot) for the others.
template <class Id, class Put, class Drop>
__device__ void scatter_phase(const SortParams& p, const SortMemory& m, const Id* ids, int block, int blocks, Put put, Drop drop) {
  sum_histograms(p, m, block, blocks);
  scan_experts(m.scan, p.E, [&](int e) { return m.total[e]; });
  write_work(m.scan, p.E, block, blocks, p.out.counts, p.out.offsets, p.work);
  const WarpSlots<Id> slots = count_slots(p, m, ids, block);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < kPerLane; i++) {
    const int64_t slot = int64_t{block} * kBlockSlots + warp * kWarpSlots + i * 32 + lane;
    if (slot >= p.slots) continue;
    const int e = slots.expert[i];
    if (e == p.E) {
      drop(slot);
      continue;
    }
    int row = m.scan.rows[e] + m.before[e] + slots.rank[i];
    for (int w = 0; w < warp; w++) row += m.counters[w * m.pitch + e];
    if (p.out.expert) p.out.expert[row] = e;
    put(slot, row);
  }
  for (int64_t row = m.scan.rows[p.E] + int64_t{block} * kIndexThreads + threadIdx.x; row < p.slots; row += int64_t{blocks} * kIndexThreads) {
    p.out.token[row] = 0;
    if (p.out.score) static_cast<float*>(p.out.score)[row] = 0.f;
    if (p.out.expert) p.out.expert[row] = 0;
    if (p.order) p.order[row] = -1;
  }
  __syncthreads();
}

// ---- top-K ---------------------------------------------------------------------------------------------------------------------
template <class Id> __global__ void __launch_bounds__(kIndexThreads) topk_histogram_kernel(SortParams p, const Id* ids) {
  const SortMemory m(p.E, shared_memory);
  histogram_phase(p, m, ids, blockIdx.x);
}
template <class Id, class Weight>
__global__ void __launch_bounds__(kIndexThreads) topk_scatter_kernel(SortParams p, const Id* ids, const Weight* weights, int K) {
  const SortMemory m(p.E, shared_memory);
  scatter_phase(p, m, ids, blockIdx.x, gridDim.x,
                [&](int64_t slot, int row) {
                  p.out.inverse[slot] = row;
                  p.out.token[row] = static_cast<int>(slot) / K;
                  static_cast<float*>(p.out.score)[row] = static_cast<float>(weights[slot]);
                  if (p.order) p.order[row] = static_cast<int>(slot);
                },
                [&](int64_t slot) { p.out.inverse[slot] = -1; });
}

// ---- lists ---------------------------------------------------------------------------------------------------------------------
struct ListsParams {
  SortParams sort;
  int64_t T;
  const void *tokens, *experts;
  const float* scores;     // optional
  int* cursor;             // [T + 1]
  int *sorted_expert, *sorted_position;   // [slots] in (token, expert) order
  int* bucket;             // [slots] list positions grouped by token, any order inside one
};

template <class Id> __global__ void __launch_bounds__(kIndexThreads) lists_kernel(ListsParams p) {
  const auto grid = cooperative_groups::this_grid();
  const auto* tokens = static_cast<const Id*>(p.tokens);
  const auto* experts = static_cast<const Id*>(p.experts);
  const int64_t first = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x, step = int64_t{gridDim.x} * kIndexThreads, slots = p.sort.slots;
  const SortMemory m(p.sort.E, shared_memory);
  int* offsets = p.sort.out.token_offsets;
  auto kept = [&](int64_t i) {
    return static_cast<uint64_t>(static_cast<int64_t>(experts[i])) < static_cast<uint64_t>(p.sort.E) && static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) < static_cast<uint64_t>(p.T);
  };

  for (int64_t t = first; t <= p.T; t += step) p.cursor[t] = 0;
  for (int64_t i = first; i < slots; i += step) p.sorted_expert[i] = p.sort.E;
  grid.sync();
  for (int64_t i = first; i < slots; i += step)
    if (kept(i)) atomicAdd(p.cursor + tokens[i], 1);
  grid.sync();
  if (blockIdx.x == 0) {   // token_offsets = exclusive sum; cursor starts at them
    using Scan = cub::BlockScan<int, kIndexThreads>;
    __shared__ typename Scan::TempStorage storage;
    __shared__ int carry;
    if (threadIdx.x == 0) carry = 0;
    for (int64_t base = 0; base <= p.T; base += kIndexThreads * 8) {
      int value[8], total;
      for (int i = 0; i < 8; i++) {
        const int64_t t = base + threadIdx.x * 8 + i;
        value[i] = t < p.T ? p.cursor[t] : 0;
      }
      __syncthreads();
      Scan(storage).ExclusiveSum(value, value, total);
      const int start = carry;
      for (int i = 0; i < 8; i++) {
        const int64_t t = base + threadIdx.x * 8 + i;
        if (t <= p.T) offsets[t] = p.cursor[t] = start + value[i];
      }
      __syncthreads();
      if (threadIdx.x == 0) carry = start + total;
      __syncthreads();
    }
  }
  grid.sync();
  for (int64_t i = first; i < slots; i += step)
    if (kept(i)) p.bucket[atomicAdd(p.cursor + tokens[i], 1)] = static_cast<int>(i);
  grid.sync();
  for (int64_t i = first; i < offsets[p.T]; i += step) {   // the rank of a pair in its token: pairs of smaller experts
    const int position = p.bucket[i];
    const int64_t token = tokens[position], expert = experts[position];
    int rank = 0;
    for (int j = offsets[token]; j < offsets[token + 1]; j++) {
      const int64_t other = experts[p.bucket[j]];
      rank += other < expert || (other == expert && p.bucket[j] < position);
    }
    p.sorted_expert[offsets[token] + rank] = static_cast<int>(expert);
    p.sorted_position[offsets[token] + rank] = position;
  }
  grid.sync();
  const int blocks = static_cast<int>((slots + kBlockSlots - 1) / kBlockSlots);
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) histogram_phase(p.sort, m, p.sorted_expert, block);
  grid.sync();
  for (int block = blockIdx.x; block < blocks; block += gridDim.x)
    scatter_phase(p.sort, m, p.sorted_expert, block, blocks,
                  [&](int64_t slot, int row) {
                    const int position = p.sorted_position[slot];
                    p.sort.out.inverse[slot] = row;
                    p.sort.out.token[row] = static_cast<int>(tokens[position]);
                    if (p.scores) static_cast<float*>(p.sort.out.score)[row] = p.scores[position];
                    if (p.sort.order) p.sort.order[row] = position;
                  },
                  [&](int64_t slot) { p.sort.out.inverse[slot] = -1; });
}

// ---- rows ----------------------------------------------------------------------------------------------------------------------
// Lists made by hand: token_offsets and inverse from token. One block: a path for tests and tools, not for training.
__device__ void index_tokens(const Routing& r, int64_t T, int64_t R_cap, int E) {
  const int R = r.offsets[E];
  for (int64_t t = threadIdx.x; t < T; t += kIndexThreads) {
    int begin = 0;
    for (int row = 0; row < R; row++) begin += r.token[row] < t;
    r.token_offsets[t] = begin;
    for (int row = 0; row < R; row++)
      if (r.token[row] == t) r.inverse[begin++] = row;
  }
  if (threadIdx.x == 0) r.token_offsets[T] = R;
  for (int64_t i = R + threadIdx.x; i < R_cap; i += kIndexThreads) r.inverse[i] = -1;
}

__global__ void __launch_bounds__(kIndexThreads) rows_kernel(Routing r, WorkList work, int E, int64_t T, int64_t R_cap, bool lists) {
  const ExpertScan scan = ExpertScan::carve(shared_memory, E);
  scan_experts(scan, E, [&](int e) { return max(r.counts[e], 0); });
  write_work(scan, E, blockIdx.x, gridDim.x, nullptr, r.offsets, work);
  if (!lists) return;
  __syncthreads();
  index_tokens(r, T, R_cap, E);
}

// ---- host ----------------------------------------------------------------------------------------------------------------------
void check_experts(const Shape& s) { MACHMOE_SUPPORTED(s.E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", s.E, kMaxExperts); }

SortParams sort_params(const Shape& s, const Routing& out, int32_t* order, int* histogram) {
  return {s.R_cap, static_cast<int>(s.E), histogram, out, work_list(out.tiles, s.R_cap, s.E), order};
}
template <class Kernel> void allow_smem(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024) MACHMOE_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

struct Scratch {
  int *histogram, *cursor, *sorted_expert, *sorted_position, *bucket;
};
Scratch book(const Shape& s, Workspace& ws) {
  Scratch b{};
  b.histogram = ws.take<int>(blocks_of(s.R_cap) * s.E);
  if (s.kind != RoutingKind::Lists) return b;
  b.cursor = ws.take<int>(s.T + 1);
  b.sorted_expert = ws.take<int>(s.R_cap);
  b.sorted_position = ws.take<int>(s.R_cap);
  b.bucket = ws.take<int>(s.R_cap);
  return b;
}

template <class F> void dispatch_ids(DType dtype, F&& f) {
  if (dtype == DType::I64) f(int64_t{}); else f(int32_t{});
}
template <class F> void dispatch_weights(DType dtype, F&& f) {
  if (dtype == DType::BF16) f(__nv_bfloat16{}); else if (dtype == DType::F16) f(__half{}); else f(float{});
}

}  // namespace

size_t index_scratch(const Shape& s) {
  if (s.kind == RoutingKind::Rows) return 0;
  Workspace ws;
  book(s, ws);
  return ws.used();
}

void index_topk(const IndexTopkArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  Workspace ws(a.scratch);
  const SortParams p = sort_params(s, a.out, a.order, book(s, ws).histogram);
  const auto blocks = static_cast<unsigned>(blocks_of(s.R_cap));
  const size_t smem = sort_smem(s.E);
  dispatch_ids(a.ids_dtype, [&](auto id) {
    using Id = decltype(id);
    const auto* ids = static_cast<const Id*>(a.ids);
    allow_smem(topk_histogram_kernel<Id>, smem);
    topk_histogram_kernel<Id><<<blocks, kIndexThreads, smem, stream_of(stream)>>>(p, ids);
    dispatch_weights(a.weights_dtype, [&](auto weight) {
      using Weight = decltype(weight);
      allow_smem(topk_scatter_kernel<Id, Weight>, smem);
      topk_scatter_kernel<Id, Weight><<<blocks, kIndexThreads, smem, stream_of(stream)>>>(p, ids, static_cast<const Weight*>(a.weights), static_cast<int>(s.K));
    });
  });
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

void index_lists(const IndexListsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  ListsParams p{sort_params(s, a.out, a.order, b.histogram), s.T, a.token_ids, a.expert_ids, static_cast<const float*>(a.scores), b.cursor, b.sorted_expert,
                b.sorted_position, b.bucket};
  if (!a.scores) p.sort.out.score = nullptr;
  if (s.R_cap == 0) {   // nothing to sort: offsets, token_offsets and an empty work list
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.token_offsets, 0, sizeof(int32_t) * static_cast<size_t>(s.T + 1), stream_of(stream)));
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.counts, 0, sizeof(int32_t) * static_cast<size_t>(s.E), stream_of(stream)));
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.offsets, 0, sizeof(int32_t) * static_cast<size_t>(s.E + 1), stream_of(stream)));
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.tiles, 0, sizeof(WorkHeader), stream_of(stream)));
    return;
  }
  const size_t smem = sort_smem(s.E);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(num_sms(), (s.R_cap + kIndexThreads - 1) / kIndexThreads));
  dispatch_ids(a.ids_dtype, [&](auto id) {
    auto* kernel = lists_kernel<decltype(id)>;
    allow_smem(kernel, smem);
    void* args[] = {&p};
    MACHMOE_CUDA_CALL(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(kIndexThreads), args, smem, stream_of(stream)));
  });
}

void index_rows(const IndexRowsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  const bool lists = s.kind == RoutingKind::Lists;
  const int64_t entries = work_capacity(s.R_cap, s.E, kTileRows);
  const unsigned blocks = lists ? 1u : static_cast<unsigned>(std::clamp<int64_t>(entries / kIndexThreads, 1, 32));
  const size_t smem = sizeof(int) * static_cast<size_t>(3 * (s.E + 1));
  allow_smem(rows_kernel, smem);
  rows_kernel<<<blocks, kIndexThreads, smem, stream_of(stream)>>>(a.out, work_list(a.out.tiles, s.R_cap, s.E), static_cast<int>(s.E), s.T, s.R_cap, lists);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
