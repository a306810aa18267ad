// Routing metadata: a stable counting sort of the slots by expert. No host sync; integer counters alone, so no bit depends on timing.
//   top-K   two launches: each slot's rank among the equal ones of its chunk, and the chunk's histogram; then the rows
//   lists   one cooperative launch puts the pairs in (token, expert) order, which makes them the slots of the same two
//   rows    one launch: offsets and the work lists from counts; ready-made lists also group their rows by token
#include <cooperative_groups.h>

#include <algorithm>

#include "core/workspace.h"
#include "cuda/launch.h"
#include "cuda/scan.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kWarps = kIndexThreads / 32;
constexpr int kMaxPerLane = 4;
constexpr int kItems = kMaxExperts / kIndexThreads;  // experts of a thread
constexpr int kScatterBlocks = 128;                  // beside the blocks of the work lists all at once on 132 SMs (up to 512 experts)

// Consecutive slots that one block ranks: few, for one SM scatters slowly, but the scattering blocks each read all histograms.
struct Chunks {
  int per_lane, count;
  Chunks(int64_t slots, int64_t E) {
    constexpr int64_t kHistograms = 1 << 16;
    for (per_lane = 1;; per_lane *= 2) {
      count = static_cast<int>(std::max<int64_t>(1, (slots + kIndexThreads * per_lane - 1) / (kIndexThreads * per_lane)));
      if (per_lane == kMaxPerLane || (count <= kScatterBlocks && count * E <= kHistograms)) return;
    }
  }
};

struct SortParams {
  int64_t slots;  // = R_cap
  int E;
  Chunks chunks;
  uint16_t* histogram;  // [chunks][E rounded up to 2]
  uint16_t* rank;       // [slots] among the slots of the same chunk and expert
  Routing out;
  WorkList work;
  uint32_t* turns = nullptr;  // set to 0; optional
};
extern __shared__ int shared_memory[];

// Slot i of this lane: those of a warp are consecutive.
__device__ int64_t slot_of(int per_lane, int chunk, int i) {
  return (int64_t{chunk} * kIndexThreads + threadIdx.x / 32 * 32) * per_lane + i * 32 + threadIdx.x % 32;
}
// The experts of this lane's slots; E: dropped. All loads at once.
template <class Id>
__device__ void load_experts(const SortParams& p, const Id* ids, int chunk, int (&expert)[kMaxPerLane]) {
  Id id[kMaxPerLane];
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    const int64_t slot = slot_of(p.chunks.per_lane, chunk, i);
    id[i] = i < p.chunks.per_lane && slot < p.slots ? ids[slot] : Id{-1};
  }
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    const auto e = static_cast<uint64_t>(static_cast<int64_t>(id[i]));  // a negative id is a huge one
    expert[i] = e < static_cast<uint64_t>(p.E) ? static_cast<int>(e) : p.E;
  }
}

// ---- ranks and histograms --------------------------------------------------------------------------------------------------------
// How often each expert occurs in each warp's slots: bytes (a warp has at most 128 slots), those of an expert side by side. The odd pitch of 9 words
// spreads experts over the banks.
class WarpCounters {
 public:
  static constexpr int kPitch = kWarps / 4 + 1;
  static size_t bytes(int64_t E) { return sizeof(int) * static_cast<size_t>(kPitch * E); }
  __device__ explicit WarpCounters(int* memory) : words_(reinterpret_cast<unsigned*>(memory)) {}
  __device__ void clear(int E) const {
    for (int i = threadIdx.x; i < kPitch * E; i += kIndexThreads) words_[i] = 0;
  }
  __device__ uint8_t& at(int e, int warp) const { return reinterpret_cast<uint8_t*>(words_ + kPitch * e)[warp]; }
  // The sum over the first `warps` warps.
  __device__ int sum(int e, int warps) const {
    const unsigned* words = words_ + kPitch * e;
    unsigned total = __dp4a(words[warps / 4] & ((1u << warps % 4 * 8) - 1), 0x01010101u, 0u);
    for (int i = 0; i < warps / 4; i++) total = __dp4a(words[i], 0x01010101u, total);
    return static_cast<int>(total);
  }

 private:
  unsigned* words_;
};

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
__global__ void __launch_bounds__(kIndexThreads, 1) rank_kernel(SortParams p, const Id* ids) {
  cudaGridDependencySynchronize();
  const WarpCounters counters(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = blockIdx.x, per_lane = p.chunks.per_lane, bits = 32 - __clz(p.E);
  if (p.turns && blockIdx.x == 0 && threadIdx.x == 0) *p.turns = 0;
  int expert[kMaxPerLane], rank[kMaxPerLane];
  load_experts(p, ids, chunk, expert);
  counters.clear(p.E);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++) {
    if (i == per_lane) break;
    const int e = expert[i];
    const unsigned same = same_value(e, bits);
    const int below = __popc(same & ((1u << lane) - 1)), before = e < p.E ? counters.at(e, warp) : 0;
    __syncwarp();
    if (below == 0 && e < p.E) counters.at(e, warp) = static_cast<uint8_t>(before + __popc(same));
    __syncwarp();
    rank[i] = before + below;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxPerLane; i++)
    if (i < per_lane && expert[i] < p.E) p.rank[slot_of(per_lane, chunk, i)] = static_cast<uint16_t>(counters.sum(expert[i], warp) + rank[i]);
  const int pitch = (p.E + 1) / 2 * 2;
  for (int e = threadIdx.x; e < pitch; e += kIndexThreads)
    p.histogram[int64_t{chunk} * pitch + e] = static_cast<uint16_t>(e < p.E ? counters.sum(e, kWarps) : 0);
}

// ---- rows ------------------------------------------------------------------------------------------------------------------------
// Sums the histograms of all chunks and of those before chunk `first`, into [E rounded up to 2]; several threads share two experts.
__device__ inline void sum_histograms(const SortParams& p, int first, int* before, int* total) {
  constexpr int kLoads = 8;
  const int pairs = (p.E + 1) / 2, width = min((pairs + 31) / 32 * 32, kIndexThreads), groups = kIndexThreads / width, group = threadIdx.x / width;
  for (int e = threadIdx.x; e < 2 * pairs; e += kIndexThreads) before[e] = total[e] = 0;
  __syncthreads();
  const auto* histogram = reinterpret_cast<const ushort2*>(p.histogram);
  for (int pair = threadIdx.x % width; pair < pairs && group < groups; pair += width) {
    int2 early{}, all{};
    for (int base = group; base < p.chunks.count; base += kLoads * groups)
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        const int chunk = base + i * groups;
        const ushort2 n = chunk < p.chunks.count ? histogram[int64_t{chunk} * pairs + pair] : ushort2{};
        all.x += n.x, all.y += n.y;
        if (chunk < first) early.x += n.x, early.y += n.y;
      }
    atomicAdd(before + 2 * pair, early.x);
    atomicAdd(before + 2 * pair + 1, early.y);
    atomicAdd(total + 2 * pair, all.x);
    atomicAdd(total + 2 * pair + 1, all.y);
  }
  __syncthreads();
}

// The arrays of a scattering block.
struct ScatterMemory {
  int *before, *total;  // [E rounded up to 2] rows of earlier chunks, of all
  int* start;           // [E] rows of lower experts in this chunk: the chunk is sorted in shared memory first, so that runs of rows leave together
  int* shift;           // [E] from there to the routing's rows
  unsigned* item;       // [slots of a chunk] expert and slot
  static constexpr int64_t pitch(int64_t E) { return (E + 1) / 2 * 2; }
  __device__ ScatterMemory(int* memory, int E)
      : before(memory),
        total(before + pitch(E)),
        start(total + pitch(E)),
        shift(start + pitch(E)),
        item(reinterpret_cast<unsigned*>(shift + pitch(E))) {}
  static size_t bytes(int64_t E, const Chunks& chunks) {
    return sizeof(int) * static_cast<size_t>(std::max(4 * pitch(E) + chunks.per_lane * kIndexThreads, ExpertScan::ints(E)));
  }
};

// Source: writes what a row needs to know of its slot.
template <class Id, class Source>
__global__ void __launch_bounds__(kIndexThreads, 1) scatter_kernel(SortParams p, const Id* ids, Source source) {
  cudaGridDependencySynchronize();
  const int lists = work_blocks(p.E), blocks = static_cast<int>(gridDim.x) - lists, block = static_cast<int>(blockIdx.x) - lists,
            count = p.chunks.count;
  if (block < 0) {
    ExpertScan scan(shared_memory, p.E);
    sum_histograms(p, 0, scan.rows, scan.tiles);  // both are written later
    scan.run(p.E, p.slots, [&](int e) { return scan.tiles[e]; });
    write_work(scan, p.E, blockIdx.x, lists, p.out.counts, p.out.offsets, p.work);
    return;
  }
  const int per_lane = p.chunks.per_lane, chunk_slots = per_lane * kIndexThreads;
  const ScatterMemory m(shared_memory, p.E);
  int expert[kMaxPerLane], rank[kMaxPerLane], own[kItems];
  const auto load = [&](int chunk) {
    load_experts(p, ids, chunk, expert);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int e = static_cast<int>(threadIdx.x) * kItems + i;
      own[i] = e < p.E ? p.histogram[chunk * ScatterMemory::pitch(p.E) + e] : 0;
    }
#pragma unroll
    for (int i = 0; i < kMaxPerLane; i++) rank[i] = expert[i] < p.E ? p.rank[slot_of(per_lane, chunk, i)] : 0;
  };
  const int first = count * block / blocks, end = count * (block + 1) / blocks;  // count < 2^20
  load(first);
  sum_histograms(p, first, m.before, m.total);
  int rows = 0;  // R
  for (int chunk = first; chunk < end; chunk++) {
    uint64_t sum = 0, sums;  // rows of the experts before, above those in this chunk
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int e = static_cast<int>(threadIdx.x) * kItems + i;
      if (e < p.E) sum += uint64_t(static_cast<unsigned>(m.total[e])) << 32 | static_cast<unsigned>(own[i]);
    }
    sum = exclusive_sum(sum, sums);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int e = static_cast<int>(threadIdx.x) * kItems + i, start = static_cast<int>(static_cast<unsigned>(sum));
      if (e >= p.E) break;
      m.start[e] = start;
      m.shift[e] = static_cast<int>(sum >> 32) + m.before[e] - start;
      m.before[e] += own[i];
      sum += uint64_t(static_cast<unsigned>(m.total[e])) << 32 | static_cast<unsigned>(own[i]);
    }
    __syncthreads();
    const int64_t base = int64_t{chunk} * chunk_slots;
#pragma unroll
    for (int i = 0; i < kMaxPerLane; i++) {
      if (i == per_lane) break;
      const int64_t slot = slot_of(per_lane, chunk, i);
      const int e = expert[i];
      if (slot >= p.slots) break;
      if (e == p.E) {
        p.out.inverse[slot] = -1;
        continue;
      }
      const int at = m.start[e] + rank[i];
      p.out.inverse[slot] = m.shift[e] + at;
      m.item[at] = static_cast<unsigned>(e) << 16 | static_cast<unsigned>(slot - base);
    }
    __syncthreads();
    if (chunk + 1 < end) load(chunk + 1);
    for (int at = threadIdx.x; at < static_cast<int>(static_cast<unsigned>(sums)); at += kIndexThreads) {
      const unsigned item = m.item[at];
      const int e = static_cast<int>(item >> 16), row = m.shift[e] + at;
      source.write(p.out, row, base + (item & 0xFFFFu));
      if (p.out.expert) p.out.expert[row] = e;
    }
    rows = static_cast<int>(sums >> 32);
    __syncthreads();
  }
  for (int64_t row = rows + int64_t{block} * kIndexThreads + threadIdx.x; row < p.slots; row += int64_t{blocks} * kIndexThreads) {
    clear_row(p.out, row);
    source.clear(row);
  }
}

struct TopkSource {
  __device__ void write(const Routing& out, int row, int64_t slot) const { out.slot[row] = static_cast<int>(slot); }
  __device__ void clear(int64_t) const {}
};

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
    const int64_t t = base + threadIdx.x;
    int total;
    const int before = exclusive_sum(t < share.end ? g.cursor[t] : 0, total);
    if (t < share.end) g.offsets[t] = g.cursor[t] = start + before;
    start += total;
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
  int64_t items;  // = R_cap
  int E;
  TokenGroups groups;
  const void *tokens, *experts;
  int *slot_expert, *slot_position;  // [items] in (token, expert) order; the expert of an empty slot is E
};

template <class Id>
__global__ void __launch_bounds__(kIndexThreads, 1) lists_kernel(ListsParams p) {
  cudaGridDependencySynchronize();
  const auto grid = cooperative_groups::this_grid();
  const auto* tokens = static_cast<const Id*>(p.tokens);
  const auto* experts = static_cast<const Id*>(p.experts);
  for (int64_t i = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x; i < p.items; i += int64_t{gridDim.x} * kIndexThreads) p.slot_expert[i] = p.E;
  group_by_token(
      grid, p.groups, p.items,
      [&](int64_t i) -> int64_t {
        const int64_t t = tokens[i], e = experts[i];
        return static_cast<uint64_t>(e) < static_cast<uint64_t>(p.E) && static_cast<uint64_t>(t) < static_cast<uint64_t>(p.groups.T) ? t : -1;
      },
      [&](int a, int b) { return experts[a] < experts[b] || (experts[a] == experts[b] && a < b); },
      [&](int position, int slot) {
        p.slot_expert[slot] = static_cast<int>(experts[position]);
        p.slot_position[slot] = position;
      });
}

template <class Id>
struct ListSource {
  const Id* tokens;
  const float* scores;  // optional
  const int* position;
  int* order;  // optional
  __device__ void write(const Routing& out, int row, int64_t slot) const {
    const int i = position[slot];
    out.token[row] = static_cast<int>(tokens[i]);
    if (scores) static_cast<float*>(out.score)[row] = scores[i];
    if (order) order[row] = i;
  }
  __device__ void clear(int64_t row) const {
    if (order) order[row] = -1;
  }
};

// ---- counts ready ----------------------------------------------------------------------------------------------------------------
__device__ void rows_phase(const Routing& r, const WorkList& work, int E, int64_t R_cap) {
  ExpertScan scan(shared_memory, E);
  scan.run(E, R_cap, [&](int e) { return max(r.counts[e], 0); });
  write_work(scan, E, blockIdx.x, gridDim.x, nullptr, r.offsets, work);
}
__global__ void __launch_bounds__(kIndexThreads, 1) rows_kernel(Routing r, WorkList work, int E, int64_t R_cap) {
  cudaGridDependencySynchronize();
  rows_phase(r, work, E, R_cap);
}

__global__ void __launch_bounds__(kIndexThreads, 1) list_rows_kernel(Routing r, WorkList work, TokenGroups groups, int E, int64_t R_cap) {
  cudaGridDependencySynchronize();
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

template <class... Args>
void launch_cooperative(void (*kernel)(Args...), int64_t items, size_t smem, Stream stream, Args... args) {
  if (smem > 40 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), smem);
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((items + kIndexThreads - 1) / kIndexThreads, 1, num_sms()));
  void* pointers[] = {&args...};
  MACHMOE_CUDA_CALL(
      cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(kIndexThreads), pointers, smem, stream_of(stream)));
}

struct Scratch {
  uint16_t *histogram, *rank;
  int *cursor, *sums, *bucket, *slot_expert, *slot_position;  // lists
};
Scratch book(const Shape& s, Workspace& ws) {
  constexpr int kMaxGrid = 1024;  // SMs of any device
  Scratch b{};
  if (s.kind == RoutingKind::Rows) return b;
  b.histogram = ws.take<uint16_t>(Chunks(s.R_cap, s.E).count * ScatterMemory::pitch(s.E));
  b.rank = ws.take<uint16_t>(s.R_cap);
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

// The two launches of the sort.
template <class Id, class Source>
void launch_sort(const SortParams& p, const Id* ids, const Source& source, Stream stream) {
  launch_kernel(rank_kernel<Id>, static_cast<unsigned>(p.chunks.count), kIndexThreads, WarpCounters::bytes(p.E), stream, p, ids);
  const auto blocks = static_cast<unsigned>(std::min(p.chunks.count, kScatterBlocks) + work_blocks(p.E));
  launch_kernel(scatter_kernel<Id, Source>, blocks, kIndexThreads, ScatterMemory::bytes(p.E, p.chunks), stream, p, ids, source);
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
  const Scratch b = book(s, ws);
  const SortParams p{s.R_cap, static_cast<int>(s.E), Chunks(s.R_cap, s.E), b.histogram, b.rank, a.out, work_list(a.out.tiles, s.E), a.turns};
  dispatch_ids(a.ids_dtype, [&](auto id) { launch_sort(p, static_cast<const decltype(id)*>(a.ids), TopkSource(), stream); });
}

void index_lists(const IndexListsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  if (s.R_cap == 0) {  // no pairs: zero tokens are grouped, and the list of tiles is empty
    MACHMOE_CUDA_CALL(cudaMemsetAsync(a.out.counts, 0, sizeof(int32_t) * static_cast<size_t>(s.E), stream_of(stream)));
    index_rows({s, a.out, a.scratch}, stream);
    return;
  }
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  const ListsParams lists{s.R_cap, static_cast<int>(s.E), token_groups(s, a.out, b), a.token_ids, a.expert_ids, b.slot_expert, b.slot_position};
  SortParams sort{s.R_cap, static_cast<int>(s.E), Chunks(s.R_cap, s.E), b.histogram, b.rank, a.out, work_list(a.out.tiles, s.E)};
  if (!a.scores) sort.out.score = nullptr;  // left alone, also past R
  dispatch_ids(a.ids_dtype, [&](auto id) {
    using Id = decltype(id);
    launch_cooperative(lists_kernel<Id>, s.R_cap, 0, stream, lists);
    const ListSource<Id> source{static_cast<const Id*>(a.token_ids), static_cast<const float*>(a.scores), b.slot_position, a.order};
    launch_sort(sort, b.slot_expert, source, stream);
  });
}

void index_rows(const IndexRowsArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_experts(s);
  const WorkList work = work_list(a.out.tiles, s.E);
  const size_t smem = sizeof(int) * static_cast<size_t>(ExpertScan::ints(s.E));
  if (s.kind == RoutingKind::Lists) {
    Workspace ws(a.scratch);
    launch_cooperative(list_rows_kernel, std::max({s.R_cap, s.T, int64_t{work_blocks(s.E)} * kIndexThreads}), smem, stream, a.out, work,
                       token_groups(s, a.out, book(s, ws)), static_cast<int>(s.E), s.R_cap);
    return;
  }
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(work_capacity(s.R_cap, s.E) / kIndexThreads, work_blocks(s.E), 32));
  launch_kernel(rows_kernel, blocks, kIndexThreads, smem, stream, a.out, work, static_cast<int>(s.E), s.R_cap);
}

}  // namespace machmoe::cuda
