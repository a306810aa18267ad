// Token rounding (arXiv 2512.14080, §5, Algorithm 4) without a sort: every expert finds the key of its last kept token bit by bit.
//   mark    top-K of each token; keys of all pairs, transposed to [E][T]; f = rows of each expert
//   select  target of each expert and the threshold of its keys                    (Balance-f: its targets by one thread before)
//   rows    offsets, work list, and the kept tokens of each expert in ascending order; which experts a token has, as bits
//   slots   token_offsets; then the inverse map and renormalised scores
// A key is the bits of a score in [0, 1] below a bit that says whether the pair is among the token's top K: larger keys rank first, and of equal
// ones the lower token.
#include <algorithm>

#include "core/token_rounding.h"
#include "core/workspace.h"
#include "cuda/launch.h"
#include "cuda/router.cuh"
#include "cuda/scan.cuh"

namespace machmoe::cuda {
namespace {

constexpr uint32_t kChosen = 1u << 30;
constexpr int kMaxScoredTile = 2048;  // NrS sorts one tile of scores in shared memory

struct Params {
  int64_t T, R_cap;
  int E, K, tile;
  bool rounding;  // T >= tile
  RoundingRule rule;
  bool renormalize;
  uint64_t seed;
  const float* scores;  // [T, E]
  Routing out;
  WorkList work;
  uint32_t* keys;     // [E][T]
  int* topk_count;    // [E]
  int* token_count;   // [T]
  unsigned* experts;  // [(E + 31) / 32][T] bit e % 32 of word e / 32: token t has expert e
  uint2* threshold;   // [E] smallest kept key, and how many tokens of exactly that key are kept
};

__device__ inline float score_of(uint32_t key) { return __uint_as_float(key & (kChosen - 1)); }

// ---- mark ----------------------------------------------------------------------------------------------------------------------
// A warp per token; kPerLane = 0: any E and K, by bisection of the keys in shared memory.
extern __shared__ uint32_t tile_keys[];  // [warps][E | 1]

__device__ inline void mark_by_bisection(uint32_t* row, int E, int K, int lane) {
  uint32_t threshold = 0;
#pragma unroll 1
  for (int bit = 29; bit >= 0; bit--) {
    const uint32_t candidate = threshold | 1u << bit;
    int above = 0;
    for (int e = lane; e < E; e += 32) above += row[e] >= candidate;
    if (static_cast<int>(__reduce_add_sync(kAllLanes, above)) >= K) threshold = candidate;
  }
  int greater = 0;
  for (int e = lane; e < E; e += 32) greater += row[e] > threshold;
  int equals = K - static_cast<int>(__reduce_add_sync(kAllLanes, greater));  // those with the lowest ids
  for (int base = 0; base < E; base += 32) {
    const int e = base + lane;
    const uint32_t key = e < E ? row[e] : 0;
    const unsigned same = __ballot_sync(kAllLanes, e < E && key == threshold);
    const bool first = __popc(same & ((1u << lane) - 1)) < equals;
    if (e < E && (key > threshold || (key == threshold && first))) row[e] = key | kChosen;
    equals -= min(__popc(same), equals);
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(kPerLane > 8 ? 512 : 1024, 1) mark_kernel(const __grid_constant__ Params p) {
  __shared__ ulonglong2 memory[kPerLane > 8 ? 16 : 32][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, pitch = p.E | 1;
  const int64_t first = int64_t{blockIdx.x} * warps, t = first + warp;
  uint32_t* row = tile_keys + warp * pitch;
  auto load = [&](int e) {
    const float s = p.scores[t * p.E + e];
    return s > 0.f && s <= 1.f ? __float_as_uint(s) : 0u;
  };
  if (t < p.T) {
    if constexpr (kPerLane > 0) {
      uint32_t key[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; j++) {
        const int e = j * 32 + lane;
        const uint32_t score = e < p.E ? load(e) : 0u;
        if (e < p.E) row[e] = score;
        key[j] = e < p.E ? score + 1 : 0u;
      }
      __syncwarp();
      const Selected mine = select_best(key, p.K, lane, memory[warp]);
      if (mine.rank < p.K) row[mine.index] |= kChosen;
    } else {
      for (int e = lane; e < p.E; e += 32) row[e] = load(e);
      __syncwarp();
      mark_by_bisection(row, p.E, p.K, lane);
    }
  }
  __syncthreads();
  const int tokens = static_cast<int>(min(static_cast<int64_t>(warps), p.T - first));
  const int per_warp = 32 / warps, sub = lane / warps, column = lane % warps;  // 32 / warps experts at a time
  for (int base = warp * per_warp; base < p.E; base += warps * per_warp) {
    const int e = base + sub;
    const bool valid = e < p.E && column < tokens;
    const uint32_t key = valid ? tile_keys[column * pitch + e] : 0u;
    if (valid) p.keys[int64_t{e} * p.T + first + column] = key;
    const unsigned chosen = __ballot_sync(kAllLanes, (key & kChosen) != 0);
    const int count = __popc(warps == 32 ? chosen : chosen >> sub * warps & ((1u << warps) - 1));
    if (column == 0 && count > 0) atomicAdd(p.topk_count + e, count);
  }
}

// ---- select --------------------------------------------------------------------------------------------------------------------
__global__ void balance_kernel(const __grid_constant__ Params p) {
  __shared__ int count[kMaxExperts];
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) count[e] = p.topk_count[e];
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t z = 0;
    for (int e = 0; e < p.E; e++) {
      const int f = count[e], down = f - f % p.tile;
      count[e] = int64_t{down} + p.tile <= p.T && balance_rounds_up(f, p.tile, z) ? down + p.tile : down;
      z += count[e] - f;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) p.out.counts[e] = count[e];
}

// The keys of one expert: in registers, key i of a thread being that of token 1024 i + thread; kKeys = 0: in memory, any T.
template <int kKeys>
class ExpertKeys {
 public:
  __device__ ExpertKeys(const uint32_t* keys, int64_t T) : keys_(keys), T_(T) {
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
      const int64_t t = i * kIndexThreads + static_cast<int>(threadIdx.x);
      key_[i] = t < T ? keys[t] : 0u;
    }
  }
  template <class F>
  __device__ void each(F f) const {
    if constexpr (kKeys > 0) {
#pragma unroll
      for (int i = 0; i < kKeys; i++) f(key_[i]);
    } else {
#pragma unroll 8
      for (int64_t t = threadIdx.x; t < T_; t += kIndexThreads) f(keys_[t]);
    }
  }
  // How many keys are >= bound > 0; the same in all threads of the block.
  __device__ __forceinline__ int at_least(uint32_t bound) {
    __shared__ int parts[2][32];
    int count = 0;
    each([&](uint32_t key) { count += key >= bound; });
    count = __reduce_add_sync(kAllLanes, count);
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) parts[turn_][threadIdx.x / 32] = count;
    __syncthreads();
    return __reduce_add_sync(kAllLanes, parts[turn_][threadIdx.x % 32]);
  }
  // The count-th largest key, 1 <= count <= T.
  __device__ uint32_t ranked(int count) {
    uint32_t key = 0;
#pragma unroll 1
    for (int bit = 30; bit >= 0; bit--)
      if (at_least(key | 1u << bit) >= count) key |= 1u << bit;
    return key;
  }

 private:
  const uint32_t* keys_;
  int64_t T_;
  uint32_t key_[kKeys > 0 ? kKeys : 1];
  int turn_ = 0;
};

// NrS: sums of the scores of ranks down .. f - 1 and down .. up - 1, added in rank order.
template <int kKeys>
__device__ void score_sums(ExpertKeys<kKeys>& keys, int down, int f, int up, float& below, float& span) {
  __shared__ uint32_t between[kMaxScoredTile], sorted[kMaxScoredTile];
  __shared__ int filled;
  __shared__ float sums[2];
  const uint32_t high = down > 0 ? keys.ranked(down) : ~0u, low = keys.ranked(up);
  const int from_high = down > 0 ? min(keys.at_least(high), up) - down : 0;  // further tokens with the key of rank down - 1
  if (threadIdx.x == 0) filled = 0;
  __syncthreads();
  keys.each([&](uint32_t key) {
    if (key > low && key < high) between[atomicAdd(&filled, 1)] = key;
  });
  __syncthreads();
  const int count = filled;
  for (int i = threadIdx.x; i < count; i += kIndexThreads) {
    int rank = 0;
    for (int j = 0; j < count; j++) rank += between[j] > between[i] || (between[j] == between[i] && j < i);
    sorted[rank] = between[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int i = 0; i < up - down; i++) {
      sum += score_of(i < from_high ? high : i < from_high + count ? sorted[i - from_high] : low);
      if (down + i == f - 1) sums[0] = sum;
    }
    sums[1] = sum;
  }
  __syncthreads();
  below = sums[0];
  span = sums[1];
}

template <int kKeys>
__global__ void __launch_bounds__(kIndexThreads, 1) select_kernel(const __grid_constant__ Params p) {
  const int e = blockIdx.x, f = p.topk_count[e], over = f % p.tile, down = f - over;
  ExpertKeys<kKeys> keys(p.keys + int64_t{e} * p.T, p.T);
  int target = f;
  if (p.rounding && over > 0) {
    if (p.rule == RoundingRule::BalanceF) {
      target = p.out.counts[e];
    } else {
      const bool room = int64_t{down} + p.tile <= p.T;
      float below = 0.f, span = 0.f;
      if (p.rule == RoundingRule::NrS && room) score_sums(keys, down, f, down + p.tile, below, span);
      target = room && rounds_up(p.rule, f, p.tile, p.seed, static_cast<uint32_t>(e), below, span) ? down + p.tile : down;
    }
  }
  uint32_t threshold = ~0u;
  int equals = 0;
  if (target > 0) {
    threshold = keys.ranked(target);
    equals = target - keys.at_least(threshold + 1);
  }
  if (threadIdx.x == 0) {
    p.threshold[e] = {threshold, static_cast<unsigned>(equals)};
    p.out.counts[e] = target;
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------------------------
extern __shared__ int scan_memory[];

__global__ void __launch_bounds__(kIndexThreads, 1) rows_kernel(const __grid_constant__ Params p) {
  constexpr int kPerThread = 8, kChunk = kPerThread * kIndexThreads, kWarps = kIndexThreads / 32;
  __shared__ typename IndexScan::TempStorage storage;
  __shared__ int group_sum[kPerThread * kWarps];  // low half: keys above the threshold, high half: equal ones
  const int e = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ExpertScan scan(scan_memory, p.E);
  scan.run(p.E, p.R_cap, [&](int i) { return p.out.counts[i]; });
  write_work(scan, p.E, e, p.E, nullptr, p.out.offsets, p.work);
  for (int64_t row = scan.rows[p.E] + int64_t{e} * kIndexThreads + threadIdx.x; row < p.R_cap; row += int64_t{p.E} * kIndexThreads)
    clear_row(p.out, row);

  const uint32_t threshold = p.threshold[e].x;
  const int wanted = static_cast<int>(p.threshold[e].y), start = scan.rows[e];
  const uint32_t* keys = p.keys + int64_t{e} * p.T;
  auto* score = static_cast<float*>(p.out.score);
  int above_before = 0, equal_before = 0;
  for (int64_t base = 0; base < p.T; base += kChunk) {
    uint32_t key[kPerThread];
    unsigned above[kPerThread], equal[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; i++) {
      const int64_t t = base + i * kIndexThreads + threadIdx.x;
      key[i] = t < p.T ? keys[t] : 0u;
      above[i] = __ballot_sync(kAllLanes, key[i] > threshold && t < p.T);
      equal[i] = __ballot_sync(kAllLanes, key[i] == threshold && t < p.T);
      if (lane == 0) group_sum[i * kWarps + warp] = __popc(above[i]) | __popc(equal[i]) << 16;
    }
    __syncthreads();
    int sum = threadIdx.x < kPerThread * kWarps ? group_sum[threadIdx.x] : 0, total;
    IndexScan(storage).ExclusiveSum(sum, sum, total);
    if (threadIdx.x < kPerThread * kWarps) group_sum[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; i++) {
      const unsigned lower = (1u << lane) - 1, before = static_cast<unsigned>(group_sum[i * kWarps + warp]);
      const int above_rank = above_before + static_cast<int>(before & 0xFFFFu) + __popc(above[i] & lower);
      const int equal_rank = equal_before + static_cast<int>(before >> 16) + __popc(equal[i] & lower);
      if (!(above[i] >> lane & 1) && !((equal[i] >> lane & 1) && equal_rank < wanted)) continue;
      const int row = start + above_rank + min(equal_rank, wanted), t = static_cast<int>(base) + i * kIndexThreads + static_cast<int>(threadIdx.x);
      p.out.token[row] = t;
      p.out.expert[row] = e;
      score[row] = score_of(key[i]);
      atomicOr(p.experts + int64_t{e / 32} * p.T + t, 1u << e % 32);
      atomicAdd(p.token_count + t, 1);
    }
    above_before += total & 0xFFFF;
    equal_before += total >> 16;
    __syncthreads();
  }
}

// ---- slots ---------------------------------------------------------------------------------------------------------------------
// Every block sums the counts before its share of the tokens, then scans its share.
__global__ void __launch_bounds__(kIndexThreads, 1) token_offsets_kernel(const int* count, int* offsets, int64_t T, int64_t share) {
  __shared__ typename IndexScan::TempStorage storage;
  const int64_t begin = min(blockIdx.x * share, T), end = min(begin + share, T);
  int start = 0, before;
  for (int64_t t = threadIdx.x; t < begin; t += kIndexThreads) start += count[t];
  IndexScan(storage).ExclusiveSum(start, before, start);
  for (int64_t base = begin; base < end; base += kIndexThreads) {
    const int64_t t = base + threadIdx.x;
    int total;
    __syncthreads();
    IndexScan(storage).ExclusiveSum(t < end ? count[t] : 0, before, total);
    if (t < end) offsets[t] = start + before;
    start += total;
  }
  if (end == T && begin <= T && blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) offsets[T] = start;
}

__global__ void __launch_bounds__(256) slots_kernel(const __grid_constant__ Params p) {
  const int64_t row = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (row >= p.R_cap) return;
  if (row >= p.out.offsets[p.E]) {
    p.out.inverse[row] = -1;
    return;
  }
  const int t = p.out.token[row], e = p.out.expert[row];
  int slot = p.out.token_offsets[t];
  for (int word = 0; word < e / 32; word++) slot += __popc(p.experts[word * p.T + t]);
  slot += __popc(p.experts[e / 32 * p.T + t] & ((1u << e % 32) - 1));
  p.out.inverse[slot] = static_cast<int>(row);
  if (!p.renormalize) return;
  float sum = 0.f;  // of the token's kept scores, in slot order
  for (int word = 0; word < (p.E + 31) / 32; word++)
    for (unsigned bits = p.experts[word * p.T + t]; bits; bits &= bits - 1) sum += p.scores[int64_t{t} * p.E + word * 32 + __ffs(bits) - 1];
  if (sum > 0.f) static_cast<float*>(p.out.score)[row] /= sum;
}

// ---- host ----------------------------------------------------------------------------------------------------------------------
struct Scratch {
  uint32_t* keys;
  uint2* threshold;
  int* zeroed;  // topk_count, token_count, experts
  size_t zeroed_ints;
};
Scratch book(const Shape& s, Workspace& ws) {
  Scratch b{};
  b.keys = ws.take<uint32_t>(s.T * s.E);
  b.threshold = ws.take<uint2>(s.E);
  b.zeroed_ints = static_cast<size_t>(s.E + s.T + (s.E + 31) / 32 * s.T);
  b.zeroed = ws.take<int>(static_cast<int64_t>(b.zeroed_ints));
  return b;
}

void launch_mark(const Params& p, cudaStream_t stream) {
  const bool in_registers = p.E <= 512 && p.K <= 16;
  const int warps = p.E > 1024 ? 8 : in_registers && p.E > 256 ? 16 : 32;  // tokens of a block: what shared memory and registers hold
  const size_t smem = sizeof(uint32_t) * static_cast<size_t>(warps * (p.E | 1));
  const auto blocks = static_cast<unsigned>((p.T + warps - 1) / warps);
  const auto run = [&](auto* kernel) {
    if (smem > 40 * 1024) MACHMOE_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)));
    kernel<<<blocks, static_cast<unsigned>(32 * warps), smem, stream>>>(p);
  };
  if (!in_registers) run(mark_kernel<0>);
  else if (p.E <= 32) run(mark_kernel<1>);
  else if (p.E <= 64) run(mark_kernel<2>);
  else if (p.E <= 128) run(mark_kernel<4>);
  else if (p.E <= 256) run(mark_kernel<8>);
  else run(mark_kernel<16>);
}

}  // namespace

size_t token_round_scratch(const Shape& s) {
  Workspace ws;
  book(s, ws);
  return ws.used();
}

void token_round(const TokenRoundArgs& a, Stream on) {
  const Shape& s = a.shape;
  MACHMOE_SUPPORTED(s.E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", s.E, kMaxExperts);
  MACHMOE_SUPPORTED(a.rule != RoundingRule::NrS || a.tile <= kMaxScoredTile, "tile is {}, expected at most {} with the rule NR-s on CUDA", a.tile,
                    kMaxScoredTile);
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  const cudaStream_t stream = stream_of(on);
  const Params p{s.T,
                 s.R_cap,
                 static_cast<int>(s.E),
                 static_cast<int>(a.K),
                 static_cast<int>(a.tile),
                 s.T >= a.tile,
                 a.rule,
                 a.renormalize,
                 a.seed,
                 a.scores,
                 a.out,
                 work_list(a.out.tiles, s.R_cap, s.E),
                 b.keys,
                 b.zeroed,
                 b.zeroed + s.E,
                 reinterpret_cast<unsigned*>(b.zeroed + s.E + s.T),
                 b.threshold};
  const auto experts = static_cast<unsigned>(s.E);
  MACHMOE_CUDA_CALL(cudaMemsetAsync(b.zeroed, 0, b.zeroed_ints * sizeof(int), stream));
  if (s.T > 0) launch_mark(p, stream);
  if (p.rounding && a.rule == RoundingRule::BalanceF) balance_kernel<<<1, 256, 0, stream>>>(p);
  if (s.T <= 8 * kIndexThreads) select_kernel<8><<<experts, kIndexThreads, 0, stream>>>(p);
  else if (s.T <= 16 * kIndexThreads) select_kernel<16><<<experts, kIndexThreads, 0, stream>>>(p);
  else if (s.T <= 24 * kIndexThreads) select_kernel<24><<<experts, kIndexThreads, 0, stream>>>(p);
  else if (s.T <= 32 * kIndexThreads) select_kernel<32><<<experts, kIndexThreads, 0, stream>>>(p);
  else select_kernel<0><<<experts, kIndexThreads, 0, stream>>>(p);
  const size_t smem = sizeof(int) * static_cast<size_t>(ExpertScan::ints(s.E));
  if (smem > 40 * 1024) MACHMOE_CUDA_CALL(cudaFuncSetAttribute(rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)));
  rows_kernel<<<experts, kIndexThreads, smem, stream>>>(p);
  const int64_t share = std::max<int64_t>(kIndexThreads, (s.T + num_sms() - 1) / num_sms());
  token_offsets_kernel<<<static_cast<unsigned>(std::max<int64_t>(1, (s.T + share - 1) / share)), kIndexThreads, 0, stream>>>(
      p.token_count, a.out.token_offsets, s.T, share);
  if (s.R_cap > 0) slots_kernel<<<static_cast<unsigned>((s.R_cap + 255) / 256), 256, 0, stream>>>(p);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
