// Routing metadata: a stable counting sort of the slots by expert. No host sync; integer counters alone, so no bit depends on timing.
//   top-K   two launches: the histogram of each block's slots; scan and scatter
//   lists   one cooperative launch: pairs are first put in (token, expert) order, which makes them the slots of the same sort
//   rows    one launch: offsets and the work list from counts; ready-made lists also group their rows by token
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "core/workspace.h"
#include "cuda/launch.h"
#include "cuda/scan.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kWarps = kIndexThreads / 32;
constexpr int kMaxPerLane = 4;

// The slots in blocks, in order of warps. A block scatters few slots fast; but all blocks should run at once, and each sums the histograms of all.
struct Blocks {
  int per_lane, count;
  Blocks(int64_t slots, int64_t E) {
    constexpr int64_t kAtOnce = 128, kHistograms = 1 << 15;
    for (per_lane = 1;; per_lane *= 2) {
      count = static_cast<int>(std::max<int64_t>(1, (slots + kIndexThreads * per_lane - 1) / (kIndexThreads * per_lane)));
      if (per_lane == kMaxPerLane || (count <= kAtOnce && count * E <= kHistograms)) return;
    }
  }
};

struct SortParams {
  int64_t slots;  // = R_cap
  int E;
  Blocks blocks;
  int* histogram;  // [blocks][E]
  Routing out;
  WorkList work;
  int* order;  // optional
};

// How often each expert occurs in each warp's slots: bytes (a warp has at most 128 slots), those of an expert side by side. The odd pitch of 9 words
// spreads experts over the banks.
class WarpCounters {
 public:
  static constexpr int kWords = kWarps / 4, kPitch = kWords + 1;
  static constexpr int64_t ints(int64_t E) { return kPitch * E; }
  __device__ explicit WarpCounters(int* memory) : words_(reinterpret_cast<unsigned*>(memory)) {}
  __device__ void clear(int E) const {
    for (int i = threadIdx.x; i < kPitch * E; i += kIndexThreads) words_[i] = 0;
  }
  __device__ uint8_t& at(int e, int warp) const { return reinterpret_cast<uint8_t*>(words_ + kPitch * e)[warp]; }
  // The sum over the first `warps` warps.
  __device__ int sum(int e, int warps) const {
    unsigned total = 0;
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      const int bytes = min(max(warps - 4 * i, 0), 4);
      const unsigned ones = static_cast<unsigned>(0x01010101ull & ((1ull << 8 * bytes) - 1));
      total = __dp4a(words_[kPitch * e + i], ones, total);
    }
    return static_cast<int>(total);
  }

 private:
  unsigned* words_;
};

struct SortMemory {
  ExpertScan scan;
  int* before;  // [E] rows of earlier blocks
  int* total;   // [E] rows of all blocks; lies in scan.tiles, which is written later
  WarpCounters counters;
  __device__ SortMemory(int E, int* memory) : scan(memory, E), before(memory + ExpertScan::ints(E)), total(scan.tiles), counters(before + E) {}
  static size_t bytes(int64_t E) { return sizeof(int) * static_cast<size_t>(ExpertScan::ints(E) + E + WarpCounters::ints(E)); }
};
extern __shared__ int shared_memory[];

// The experts of this lane's slots (E: dropped) and their ranks among the equal ones of the warp.
struct LaneSlots {
  int expert[kMaxPerLane], rank[kMaxPerLane];
};
__device__ int64_t slot_of(int per_lane, int block, int i) {
  return (int64_t{block} * kIndexThreads + threadIdx.x / 32 * 32) * per_lane + i * 32 + threadIdx.x % 32;
}

// The lanes whose value, below 2^bits, is the same as this lane's: a ballot a bit, which is several times faster than match.any.
__device__ inline unsigned same_value(int value, int bits) {
  unsigned same = ~0u;
  for (int b = 0; b < bits; b++) {
    const bool set = value >> b & 1;
    const unsigned lanes = __ballot_sync(~0u, set);
    same &= set ? lanes : ~lanes;
  }
  return same;
}

template <class Id>
__device__ LaneSlots count_slots(const SortParams& p, const SortMemory& m, const Id* ids, int block) {
  m.counters.clear(p.E);
  LaneSlots slots;
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    if (i == p.blocks.per_lane) break;
    const int64_t slot = slot_of(p.blocks.per_lane, block, i);
    const uint64_t id = slot < p.slots ? static_cast<uint64_t>(static_cast<int64_t>(ids[slot])) : ~uint64_t{0};
    slots.expert[i] = id < static_cast<uint64_t>(p.E) ? static_cast<int>(id) : p.E;  // a negative id is a huge one
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bits = 32 - __clz(p.E);
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    if (i == p.blocks.per_lane) break;
    const int e = slots.expert[i];
    const unsigned same = same_value(e, bits);
    const int below = __popc(same & ((1u << lane) - 1)), before = e < p.E ? m.counters.at(e, warp) : 0;
    __syncwarp();
    if (below == 0 && e < p.E) m.counters.at(e, warp) = static_cast<uint8_t>(before + __popc(same));
    __syncwarp();
    slots.rank[i] = before + below;
  }
  __syncthreads();
  return slots;
}
template <class Id>
__device__ void histogram_phase(const SortParams& p, const SortMemory& m, const Id* ids, int block) {
  count_slots(p, m, ids, block);
  for (int e = threadIdx.x; e < p.E; e += kIndexThreads) p.histogram[int64_t{block} * p.E + e] = m.counters.sum(e, kWarps);
  __syncthreads();
}

// Sums the histograms of all blocks and of those before this one; several threads share an expert.
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

// put(slot, row) for every kept slot of this block; a dropped one gets inverse -1.
template <class Id, class Put>
__device__ void scatter_phase(const SortParams& p, SortMemory& m, const Id* ids, int block, Put put) {
  const int blocks = p.blocks.count;
  sum_histograms(p, m, block, blocks);
  m.scan.run(p.E, p.slots, [&](int e) { return m.total[e]; });
  write_work(m.scan, p.E, block, blocks, p.out.counts, p.out.offsets, p.work);
  const LaneSlots slots = count_slots(p, m, ids, block);
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    if (i == p.blocks.per_lane) break;
    const int64_t slot = slot_of(p.blocks.per_lane, block, i);
    if (slot >= p.slots) continue;
    const int e = slots.expert[i];
    if (e == p.E) {
      p.out.inverse[slot] = -1;
      continue;
    }
    const int row = m.scan.rows[e] + m.before[e] + m.counters.sum(e, threadIdx.x / 32) + slots.rank[i];
    p.out.inverse[slot] = row;
    if (p.out.expert) p.out.expert[row] = e;
    put(slot, row);
  }
  for (int64_t row = m.scan.rows[p.E] + int64_t{block} * kIndexThreads + threadIdx.x; row < p.slots; row += int64_t{blocks} * kIndexThreads) {
    clear_row(p.out, row);
    if (p.order) p.order[row] = -1;
  }
  __syncthreads();
}

// ---- top-K ---------------------------------------------------------------------------------------------------------------------
template <class Id>
__global__ void __launch_bounds__(kIndexThreads, 1) topk_histogram_kernel(SortParams p, const Id* ids) {
  const SortMemory m(p.E, shared_memory);
  histogram_phase(p, m, ids, blockIdx.x);
}
template <class Id, class Weight>
__global__ void __launch_bounds__(kIndexThreads, 1) topk_scatter_kernel(SortParams p, const Id* ids, const Weight* weights, unsigned K) {
  SortMemory m(p.E, shared_memory);
  scatter_phase(p, m, ids, blockIdx.x, [&](int64_t slot, int row) {
    p.out.token[row] = static_cast<int>(static_cast<unsigned>(slot) / K);
    static_cast<float*>(p.out.score)[row] = static_cast<float>(weights[slot]);
    if (p.order) p.order[row] = static_cast<int>(slot);
  });
}

// ---- grouping by token ---------------------------------------------------------------------------------------------------------
struct TokenGroups {
  int64_t T;
  int* offsets;  // [T + 1] out: Routing::token_offsets
  int* cursor;   // [T]
  int* sums;     // [blocks of the grid]
  int* bucket;   // [items] grouped by token, any order inside one
};

struct Span {
  int64_t begin, end;
};
__device__ inline Span block_share(int64_t items) {
  const int64_t each = (items + gridDim.x - 1) / gridDim.x, begin = min(each * blockIdx.x, items);
  return {begin, min(begin + each, items)};
}
__device__ inline int block_sum(int value) {
  __shared__ typename IndexScan::TempStorage storage;
  int before, total;
  IndexScan(storage).ExclusiveSum(value, before, total);
  __syncthreads();
  return total;
}

// put(item, slot) for the items of token_of(item) >= 0, slots grouped by token and ordered by `less` inside one. The whole cooperative grid calls it.
template <class TokenOf, class Less, class Put>
__device__ void group_by_token(const cooperative_groups::grid_group& grid, const TokenGroups& g, int64_t items, TokenOf token_of, Less less,
                               Put put) {
  const int64_t first = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x, step = int64_t{gridDim.x} * kIndexThreads;
  for (int64_t t = first; t < g.T; t += step) g.cursor[t] = 0;
  grid.sync();
  for (int64_t i = first; i < items; i += step)
    if (const int64_t t = token_of(i); t >= 0) atomicAdd(g.cursor + t, 1);
  grid.sync();
  const Span share = block_share(g.T);
  int sum = 0;
  for (int64_t t = share.begin + threadIdx.x; t < share.end; t += kIndexThreads) sum += g.cursor[t];
  sum = block_sum(sum);
  if (threadIdx.x == 0) g.sums[blockIdx.x] = sum;
  grid.sync();
  int start = 0;
  for (int b = threadIdx.x; b < blockIdx.x; b += kIndexThreads) start += g.sums[b];
  start = block_sum(start);
  for (int64_t base = share.begin; base < share.end; base += kIndexThreads) {
    __shared__ typename IndexScan::TempStorage storage;
    const int64_t t = base + threadIdx.x;
    int before, total;
    IndexScan(storage).ExclusiveSum(t < share.end ? g.cursor[t] : 0, before, total);
    if (t < share.end) g.offsets[t] = g.cursor[t] = start + before;
    start += total;
    __syncthreads();
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) g.offsets[g.T] = start;
  grid.sync();
  for (int64_t i = first; i < items; i += step)
    if (const int64_t t = token_of(i); t >= 0) g.bucket[atomicAdd(g.cursor + t, 1)] = static_cast<int>(i);
  grid.sync();
  const int kept = g.offsets[g.T];
  for (int64_t j = first; j < kept; j += step) {
    const int item = g.bucket[j];
    const int64_t t = token_of(item);
    const int begin = g.offsets[t], end = g.offsets[t + 1];
    int slot = begin;
    for (int other = begin; other < end; other++) slot += less(g.bucket[other], item);
    put(item, slot);
  }
}

// ---- lists ---------------------------------------------------------------------------------------------------------------------
struct ListsParams {
  SortParams sort;
  TokenGroups groups;
  const void *tokens, *experts;
  const float* scores;               // optional
  int *slot_expert, *slot_position;  // [slots] in (token, expert) order
};

template <class Id>
__global__ void __launch_bounds__(kIndexThreads, 1) lists_kernel(ListsParams p) {
  const auto grid = cooperative_groups::this_grid();
  const auto* tokens = static_cast<const Id*>(p.tokens);
  const auto* experts = static_cast<const Id*>(p.experts);
  const int64_t slots = p.sort.slots;
  SortMemory m(p.sort.E, shared_memory);
  for (int64_t i = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x; i < slots; i += int64_t{gridDim.x} * kIndexThreads) p.slot_expert[i] = p.sort.E;
  group_by_token(
      grid, p.groups, slots,
      [&](int64_t i) -> int64_t {
        const int64_t t = tokens[i], e = experts[i];
        return static_cast<uint64_t>(e) < static_cast<uint64_t>(p.sort.E) && static_cast<uint64_t>(t) < static_cast<uint64_t>(p.groups.T) ? t : -1;
      },
      [&](int a, int b) { return experts[a] < experts[b] || (experts[a] == experts[b] && a < b); },
      [&](int position, int slot) {
        p.slot_expert[slot] = static_cast<int>(experts[position]);
        p.slot_position[slot] = position;
      });
  grid.sync();
  const int blocks = p.sort.blocks.count;
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) histogram_phase(p.sort, m, p.slot_expert, block);
  grid.sync();
  for (int block = blockIdx.x; block < blocks; block += gridDim.x)
    scatter_phase(p.sort, m, p.slot_expert, block, [&](int64_t slot, int row) {
      const int position = p.slot_position[slot];
      p.sort.out.token[row] = static_cast<int>(tokens[position]);
      if (p.scores) static_cast<float*>(p.sort.out.score)[row] = p.scores[position];
      if (p.sort.order) p.sort.order[row] = position;
    });
}

// ---- rows ----------------------------------------------------------------------------------------------------------------------
__device__ void rows_phase(const Routing& r, const WorkList& work, int E, int64_t R_cap) {
  ExpertScan scan(shared_memory, E);
  scan.run(E, R_cap, [&](int e) { return max(r.counts[e], 0); });
  write_work(scan, E, blockIdx.x, gridDim.x, nullptr, r.offsets, work);
}
__global__ void __launch_bounds__(kIndexThreads, 1) rows_kernel(Routing r, WorkList work, int E, int64_t R_cap) { rows_phase(r, work, E, R_cap); }

__global__ void __launch_bounds__(kIndexThreads, 1) list_rows_kernel(Routing r, WorkList work, TokenGroups groups, int E, int64_t R_cap) {
  const auto grid = cooperative_groups::this_grid();
  rows_phase(r, work, E, R_cap);
  grid.sync();
  const int R = r.offsets[E];
  for (int64_t i = R + int64_t{blockIdx.x} * kIndexThreads + threadIdx.x; i < R_cap; i += int64_t{gridDim.x} * kIndexThreads) r.inverse[i] = -1;
  group_by_token(
      grid, groups, R,
      [&](int64_t row) -> int64_t { return static_cast<uint64_t>(int64_t{r.token[row]}) < static_cast<uint64_t>(groups.T) ? r.token[row] : -1; },
      [](int a, int b) { return a < b; }, [&](int row, int slot) { r.inverse[slot] = row; });
}

// ---- host ----------------------------------------------------------------------------------------------------------------------
void check_experts(const Shape& s) { MACHMOE_SUPPORTED(s.E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", s.E, kMaxExperts); }

template <class Kernel>
void allow_smem(Kernel kernel, size_t bytes) {
  if (bytes > 40 * 1024) MACHMOE_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}
template <class... Args>
void launch_cooperative(void (*kernel)(Args...), int64_t items, size_t smem, Stream stream, Args... args) {
  allow_smem(kernel, smem);
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((items + kIndexThreads - 1) / kIndexThreads, 1, num_sms()));
  void* pointers[] = {&args...};
  MACHMOE_CUDA_CALL(
      cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(kIndexThreads), pointers, smem, stream_of(stream)));
}

struct Scratch {
  int* histogram;
  int *cursor, *sums, *bucket, *slot_expert, *slot_position;  // lists
};
Scratch book(const Shape& s, Workspace& ws) {
  constexpr int kMaxGrid = 1024;  // SMs of any device
  Scratch b{};
  if (s.kind != RoutingKind::Rows) b.histogram = ws.take<int>(int64_t{Blocks(s.R_cap, s.E).count} * s.E);
  if (s.kind != RoutingKind::Lists) return b;
  b.cursor = ws.take<int>(s.T);
  b.sums = ws.take<int>(kMaxGrid);
  b.bucket = ws.take<int>(s.R_cap);
  b.slot_expert = ws.take<int>(s.R_cap);
  b.slot_position = ws.take<int>(s.R_cap);
  return b;
}
TokenGroups token_groups(const Shape& s, const Routing& r, const Scratch& b) { return {s.T, r.token_offsets, b.cursor, b.sums, b.bucket}; }

template <class F>
void dispatch_ids(DType dtype, F&& f) {
  if (dtype == DType::I64) f(int64_t{});
  else f(int32_t{});
}
template <class F>
void dispatch_weights(DType dtype, F&& f) {
  if (dtype == DType::BF16) f(__nv_bfloat16{});
  else if (dtype == DType::F16) f(__half{});
  else f(float{});
}

}  // namespace

size_t index_scratch(const Shape& s) {
  Workspace ws;
  book(s, ws);
  return ws.used();
}

void index_topk(const IndexTopkArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  Workspace ws(a.scratch);
  const SortParams p{s.R_cap, static_cast<int>(s.E), Blocks(s.R_cap, s.E), book(s, ws).histogram, a.out, work_list(a.out.tiles, s.R_cap, s.E),
                     a.order};
  const auto blocks = static_cast<unsigned>(p.blocks.count);
  const size_t smem = SortMemory::bytes(s.E);
  dispatch_ids(a.ids_dtype, [&](auto id) {
    using Id = decltype(id);
    const auto* ids = static_cast<const Id*>(a.ids);
    allow_smem(topk_histogram_kernel<Id>, smem);
    topk_histogram_kernel<Id><<<blocks, kIndexThreads, smem, stream_of(stream)>>>(p, ids);
    dispatch_weights(a.weights_dtype, [&](auto weight) {
      using Weight = decltype(weight);
      allow_smem(topk_scatter_kernel<Id, Weight>, smem);
      topk_scatter_kernel<Id, Weight>
          <<<blocks, kIndexThreads, smem, stream_of(stream)>>>(p, ids, static_cast<const Weight*>(a.weights), static_cast<unsigned>(s.K));
    });
  });
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

void index_lists(const IndexListsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  if (s.R_cap == 0) {  // no pairs: zero tokens are grouped, and the work list is empty
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.counts, 0, sizeof(int32_t) * static_cast<size_t>(s.E), stream_of(stream)));
    index_rows({s, a.out, a.scratch}, stream);
    return;
  }
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  const ListsParams p{{s.R_cap, static_cast<int>(s.E), Blocks(s.R_cap, s.E), b.histogram, a.out, work_list(a.out.tiles, s.R_cap, s.E), a.order},
                      token_groups(s, a.out, b),
                      a.token_ids,
                      a.expert_ids,
                      static_cast<const float*>(a.scores),
                      b.slot_expert,
                      b.slot_position};
  ListsParams q = p;
  if (!a.scores) q.sort.out.score = nullptr;  // left alone, also past R
  dispatch_ids(a.ids_dtype, [&](auto id) { launch_cooperative(lists_kernel<decltype(id)>, s.R_cap, SortMemory::bytes(s.E), stream, q); });
}

void index_rows(const IndexRowsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  const WorkList work = work_list(a.out.tiles, s.R_cap, s.E);
  const size_t smem = sizeof(int) * static_cast<size_t>(ExpertScan::ints(s.E));
  if (s.kind == RoutingKind::Lists) {
    Workspace ws(a.scratch);
    launch_cooperative(list_rows_kernel, std::max(s.R_cap, s.T), smem, stream, a.out, work, token_groups(s, a.out, book(s, ws)),
                       static_cast<int>(s.E), s.R_cap);
    return;
  }
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(work_capacity(s.R_cap, s.E, kTileRows) / kIndexThreads, 1, 32));
  allow_smem(rows_kernel, smem);
  rows_kernel<<<blocks, kIndexThreads, smem, stream_of(stream)>>>(a.out, work, static_cast<int>(s.E), s.R_cap);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
