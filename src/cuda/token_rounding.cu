// Token rounding (arXiv 2512.14080, section 5, Algorithm 4) in one cooperative launch, bit-equal to src/cpu/token_rounding.cpp:
//   A  top-K of every token; keys, transposed to one column per expert, rank chosen tokens first, then by score
//   B  per expert: the count it is rounded to, and by radix selection the key of its last row
//   C  per expert: its rows in token order; counts, offsets, work list
//   D, E, F  per token: number of rows, offsets, inverse map
#include <cooperative_groups.h>

#include <algorithm>

#include "core/token_rounding.h"
#include "core/workspace.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/scan.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kThreads = kIndexThreads, kWarps = kThreads / 32;
constexpr int kMaxTile = 4096;
constexpr uint32_t kChosen = 1u << 30;

// key = bits of the score + 1 (0 stands below every score), and kChosen for the token's top K. Scores are in [0, 1].
__device__ uint32_t key_of(float score) { return __float_as_uint(score + 0.f) + 1; }
__device__ float score_of(uint32_t key) { return __uint_as_float((key & ~kChosen) - 1); }

struct Params {
  int T, E, K, tile;
  int64_t pitch;           // of a column of keys
  RoundingRule rule;
  bool renormalize;
  uint64_t seed;
  const float* scores;     // [T, E]
  Routing out;
  WorkList work;
  int64_t R_cap;
  uint32_t* keys;          // [E][pitch]; from C on the row of the pair, or -1
  int *topk_count, *target, *ties;   // [E]: f, rounded count, rows with exactly the key of the last one
  uint32_t* last;          // [E] key of the last row
  int* cursor;             // [T + 1]
  int tokens_per_tile;     // of phase A: its keys lie in shared memory
};
extern __shared__ int shared_ints[];

// ---- A -------------------------------------------------------------------------------------------------------------------------
__device__ void mark_topk(const Params& p) {
  auto* keys = reinterpret_cast<uint32_t*>(shared_ints);                     // [tokens_per_tile][E + 1]
  int* counts = shared_ints + p.tokens_per_tile * (p.E + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.tokens_per_tile;
  for (int e = threadIdx.x; e < p.E; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int base = blockIdx.x * width; base < p.T; base += gridDim.x * width) {
    const int t = base + warp;
    if (warp < width && t < p.T) {
      uint32_t* row = keys + warp * (p.E + 1);
      uint32_t best = 0;
      int best_id = p.E;
      for (int e = lane; e < p.E; e += 32) {
        const uint32_t key = row[e] = key_of(p.scores[int64_t{t} * p.E + e]);
        if (key > best) best = key, best_id = e;
      }
      for (int k = 0; k < p.K; k++) {
        const uint32_t top = __reduce_max_sync(~0u, best);
        const int id = __reduce_min_sync(~0u, best == top ? static_cast<unsigned>(best_id) : ~0u);
        if (id != best_id) continue;
        row[id] |= kChosen;
        atomicAdd(counts + id, 1);
        best = 0;
        best_id = p.E;
        for (int e = lane; e < p.E; e += 32)
          if (row[e] < kChosen && row[e] > best) best = row[e], best_id = e;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * p.E; i += kThreads) {
      const int e = i / width, token = i % width;
      if (base + token < p.T) p.keys[e * p.pitch + base + token] = keys[token * (p.E + 1) + e];
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < p.E; e += kThreads)
    if (counts[e]) atomicAdd(p.topk_count + e, counts[e]);
}

// ---- B -------------------------------------------------------------------------------------------------------------------------
// The key of rank count (from 1) in a column, and how many of its equals are among the first `count`.
struct Rank {
  uint32_t key;
  int ties;
};
__device__ Rank select(const uint32_t* column, int T, int count) {
  __shared__ int histogram[256];
  __shared__ uint32_t prefix;
  __shared__ int left;
  uint32_t mask = 0;
  if (threadIdx.x == 0) prefix = 0, left = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) histogram[i] = 0;
    __syncthreads();
    const uint32_t wanted = prefix;
    for (int base = 0; base < T; base += kThreads) {
      const int t = base + static_cast<int>(threadIdx.x);
      const uint32_t key = t < T ? column[t] : 0;
      const int bin = t < T && (key & mask) == wanted ? static_cast<int>(key >> shift & 255) : -1;
      const unsigned same = __match_any_sync(~0u, bin);
      if (bin >= 0 && (same & ((1u << threadIdx.x % 32) - 1)) == 0) atomicAdd(histogram + bin, __popc(same));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 255, rest = left;
      while (histogram[bin] < rest) rest -= histogram[bin--];
      left = rest;
      prefix = wanted | static_cast<uint32_t>(bin) << shift;
    }
    mask |= 255u << shift;
    __syncthreads();
  }
  const Rank result{prefix, left};
  __syncthreads();
  return result;
}

// NrS: sums of the scores of ranks down .. f - 1 and down .. up - 1, added in rank order by thread 0.
__device__ void score_sums(const uint32_t* column, int T, int down, int up, int f, float& below, float& span) {
  auto* list = reinterpret_cast<uint32_t*>(shared_ints);   // keys strictly between the two boundaries, then sorted
  __shared__ int listed, equal_first;
  const Rank low = select(column, T, up), high = down ? select(column, T, down) : Rank{~0u, 0};
  if (threadIdx.x == 0) listed = equal_first = 0;
  int size = 1;
  while (size < up - down) size *= 2;
  for (int i = threadIdx.x; i < size; i += kThreads) list[i] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < T; t += kThreads) {
    const uint32_t key = column[t];
    if (key > low.key && key < high.key) list[atomicAdd(&listed, 1)] = key;
    if (down && key == high.key) atomicAdd(&equal_first, 1);
  }
  __syncthreads();
  for (int k = 2; k <= size; k *= 2)   // bitonic, descending
    for (int j = k / 2; j; j /= 2) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ j;
        if (other <= i) continue;
        const bool descending = (i & k) == 0;
        if ((list[i] < list[other]) == descending) {
          const uint32_t swap = list[i];
          list[i] = list[other];
          list[other] = swap;
        }
      }
      __syncthreads();
    }
  if (threadIdx.x == 0) {
    const int first = !down ? 0 : low.key == high.key ? up - down : equal_first - high.ties;
    below = span = 0.f;
    for (int i = 0; i < up - down; i++) {
      span += score_of(i < first ? high.key : i < first + listed ? list[i - first] : low.key);
      if (i == f - down - 1) below = span;
    }
  }
  __syncthreads();
}

__device__ void choose_targets(const Params& p) {
  __shared__ int target;
  for (int e = blockIdx.x; e < p.E; e += gridDim.x) {
    const uint32_t* column = p.keys + e * p.pitch;
    const int f = p.topk_count[e], down = f - f % p.tile, up = down + p.tile;
    float below = 0.f, span = 0.f;
    const bool rounding = p.T >= p.tile && f != down;
    if (rounding && p.rule == RoundingRule::NrS && up <= p.T) score_sums(column, p.T, down, up, f, below, span);
    if (threadIdx.x == 0) {
      target = f;
      if (rounding && p.rule == RoundingRule::BalanceF) {
        int64_t z = 0;   // rounded - f over the experts before
        for (int i = 0; i <= e; i++) {
          const int g = p.topk_count[i], floor = g - g % p.tile;
          target = floor + p.tile <= p.T && balance_rounds_up(g, p.tile, z) ? floor + p.tile : floor;
          z += target - g;
        }
      } else if (rounding) {
        target = up <= p.T && rounds_up(p.rule, f, p.tile, p.seed, static_cast<uint32_t>(e), below, span) ? up : down;
      }
      p.target[e] = target;
    }
    __syncthreads();
    const int count = target;
    const Rank last = count ? select(column, p.T, count) : Rank{~0u, 0};
    if (threadIdx.x == 0) p.last[e] = last.key, p.ties[e] = last.ties;
    __syncthreads();
  }
}

// ---- C -------------------------------------------------------------------------------------------------------------------------
__device__ void write_rows(const Params& p) {
  const ExpertScan scan = ExpertScan::carve(shared_ints, p.E);
  scan_experts(scan, p.E, [&](int e) { return p.target[e]; });
  write_work(scan, p.E, blockIdx.x, gridDim.x, p.out.counts, p.out.offsets, p.work);
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  auto* score = static_cast<float*>(p.out.score);
  for (int e = blockIdx.x; e < p.E; e += gridDim.x) {
    uint32_t* column = p.keys + e * p.pitch;
    const uint32_t last = p.last[e];
    const int ties = p.ties[e];
    int above = scan.rows[e], equal = 0;   // rows of this expert written so far, keys equal to the last one met so far
    for (int base = 0; base < p.T; base += kThreads * kItems) {
      uint32_t key[kItems], packed[kItems], total;   // packed: kept above the last key in the low half, equal to it in the high half
      for (int i = 0; i < kItems; i++) {
        const int t = base + static_cast<int>(threadIdx.x) * kItems + i;
        key[i] = t < p.T ? column[t] : 0;
        packed[i] = key[i] > last ? 1u : key[i] == last ? 1u << 16 : 0u;
      }
      uint32_t before[kItems];
      __syncthreads();
      Scan(storage).ExclusiveSum(packed, before, total);
      for (int i = 0; i < kItems; i++) {
        const int t = base + static_cast<int>(threadIdx.x) * kItems + i;
        if (t >= p.T) continue;
        const int equal_before = equal + static_cast<int>(before[i] >> 16);
        const bool kept = key[i] > last || (key[i] == last && equal_before < ties);
        const int row = above + static_cast<int>(before[i] & 0xFFFF) + min(equal_before, ties);
        column[t] = kept ? static_cast<uint32_t>(row) : ~0u;
        if (!kept) continue;
        p.out.token[row] = t;
        p.out.expert[row] = e;
        score[row] = score_of(key[i]);
      }
      above += static_cast<int>(total & 0xFFFF);
      equal += static_cast<int>(total >> 16);
    }
  }
  for (int64_t row = scan.rows[p.E] + int64_t{blockIdx.x} * kThreads + threadIdx.x; row < p.R_cap; row += int64_t{gridDim.x} * kThreads) {
    p.out.token[row] = p.out.expert[row] = 0;
    p.out.inverse[row] = -1;
    score[row] = 0.f;
  }
}

// ---- D, E, F -------------------------------------------------------------------------------------------------------------------
// f(token, warp's first and last expert): 32 tokens a block, a range of experts a warp.
template <class F> __device__ void for_token_tiles(const Params& p, F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = (p.E + kWarps - 1) / kWarps;
  for (int base = blockIdx.x * 32; base < p.T; base += gridDim.x * 32) f(base + lane, warp * each, min(p.E, (warp + 1) * each));
}
// Rows of token t among the experts first .. last - 1.
__device__ int rows_of(const Params& p, int t, int first, int last) {
  int rows = 0;
  for (int e = first; e < last && t < p.T; e++) rows += static_cast<int>(p.keys[e * p.pitch + t]) >= 0;
  return rows;
}

__device__ void count_tokens(const Params& p) {
  __shared__ int count[32];
  for_token_tiles(p, [&](int t, int first, int last) {
    if (threadIdx.x < 32) count[threadIdx.x] = 0;
    __syncthreads();
    atomicAdd(count + threadIdx.x % 32, rows_of(p, t, first, last));
    __syncthreads();
    if (threadIdx.x < 32 && t < p.T) p.cursor[t] = count[threadIdx.x];
    __syncthreads();
  });
}

__device__ void scan_tokens(const Params& p) {
  if (blockIdx.x) return;
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int start = 0;
  for (int base = 0; base <= p.T; base += kThreads * 8) {
    int value[8], total;
    for (int i = 0; i < 8; i++) {
      const int t = base + static_cast<int>(threadIdx.x) * 8 + i;
      value[i] = t < p.T ? p.cursor[t] : 0;
    }
    __syncthreads();
    Scan(storage).ExclusiveSum(value, value, total);
    for (int i = 0; i < 8; i++) {
      const int t = base + static_cast<int>(threadIdx.x) * 8 + i;
      if (t <= p.T) p.out.token_offsets[t] = start + value[i];
    }
    start += total;
  }
}

__device__ void fill_inverse(const Params& p) {
  __shared__ int before[kWarps + 1][32];
  auto* score = static_cast<float*>(p.out.score);
  for_token_tiles(p, [&](int t, int first, int last) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    before[warp + 1][lane] = rows_of(p, t, first, last);
    __syncthreads();
    if (warp == 0) {
      before[0][lane] = t < p.T ? p.out.token_offsets[t] : 0;
      for (int w = 0; w < kWarps; w++) before[w + 1][lane] += before[w][lane];
    }
    __syncthreads();
    int slot = before[warp][lane];
    for (int e = first; e < last && t < p.T; e++) {
      const int row = static_cast<int>(p.keys[e * p.pitch + t]);
      if (row >= 0) p.out.inverse[slot++] = row;
    }
    const int begin = before[0][lane], end = before[kWarps][lane];
    __syncthreads();
    if (!p.renormalize || warp || t >= p.T) return;
    float sum = 0.f;
    for (int i = begin; i < end; i++) sum += score[p.out.inverse[i]];
    for (int i = begin; i < end && sum > 0.f; i++) score[p.out.inverse[i]] = __fdiv_rn(score[p.out.inverse[i]], sum);
  });
}

__global__ void __launch_bounds__(kThreads) token_round_kernel(const __grid_constant__ Params p) {
  const auto grid = cooperative_groups::this_grid();
  for (int e = blockIdx.x * kThreads + threadIdx.x; e < p.E; e += gridDim.x * kThreads) p.topk_count[e] = 0;
  grid.sync();
  mark_topk(p);
  grid.sync();
  choose_targets(p);
  grid.sync();
  write_rows(p);
  grid.sync();
  count_tokens(p);
  grid.sync();
  scan_tokens(p);
  grid.sync();
  fill_inverse(p);
}

int64_t pitch_of(int64_t T) { return (T + 31) / 32 * 32; }
int tokens_per_tile(int64_t E) { return E <= 1024 ? 32 : 8; }

struct Scratch {
  uint32_t *keys, *last;
  int *topk_count, *target, *ties, *cursor;
};
Scratch book(const Shape& s, Workspace& ws) {
  return {ws.take<uint32_t>(s.E * pitch_of(s.T)), ws.take<uint32_t>(s.E), ws.take<int>(s.E), ws.take<int>(s.E), ws.take<int>(s.E), ws.take<int>(s.T + 1)};
}

}  // namespace

size_t token_round_scratch(const Shape& s) {
  Workspace ws;
  book(s, ws);
  return ws.used();
}

void token_round(const TokenRoundArgs& a, Stream stream) {
  const Shape& s = a.shape;
  MACHMOE_SUPPORTED(s.E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", s.E, kMaxExperts);
  MACHMOE_SUPPORTED(a.tile <= kMaxTile, "tile is {}, expected at most {} rows on CUDA", a.tile, kMaxTile);
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  Params p{static_cast<int>(s.T), static_cast<int>(s.E), static_cast<int>(a.K), static_cast<int>(a.tile), pitch_of(s.T), a.rule, a.renormalize, a.seed, a.scores, a.out,
           work_list(a.out.tiles, s.R_cap, s.E), s.R_cap, b.keys, b.topk_count, b.target, b.ties, b.last, b.cursor, tokens_per_tile(s.E)};
  const auto ints = std::max<int64_t>({p.tokens_per_tile * (s.E + 1) + s.E, 3 * (s.E + 1), 2 * kMaxTile});
  const size_t smem = sizeof(int) * static_cast<size_t>(ints);
  MACHMOE_CUDA_CALL(cudaFuncSetAttribute(token_round_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)));
  void* args[] = {&p};
  MACHMOE_CUDA_CALL(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(token_round_kernel), dim3(static_cast<unsigned>(num_sms())), dim3(kThreads), args, smem,
                                                stream_of(stream)));
}

}  // namespace machmoe::cuda
