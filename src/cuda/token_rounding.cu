// Token rounding (arXiv 2512.14080, section 5, Algorithm 4) without a sort: every expert finds the key of its last kept token digit by digit.
//   mark    top-K of each token; keys of all pairs, transposed to [E][T]
//   select  f, target and threshold of each expert, which tokens it keeps             (Balance-f: targets by two small kernels before)
//   rows    by token: its rows and slots, which follow from how many earlier tokens every expert keeps; offsets, work lists and experts of rows
// A key is the bits of a score in [0, 1], plus one, below a bit that says whether the pair is among the token's top K: larger keys rank first, and of
// equal ones the lower token. 0: no token.
#include <algorithm>
#include <type_traits>

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
  int64_t pitch;  // T rounded up to 32
  int E, K, tile;
  bool rounding;  // T >= tile
  RoundingRule rule;
  bool renormalize;
  uint64_t seed;
  const uint32_t* scores;  // [T, E] the bits
  Routing out;
  WorkList work;
  uint32_t* keys;   // [E rounded up to 4][pitch], 0 past T
  int* topk_count;  // [E] for Balance-f
  uint2* members;   // [E][pitch / 32] bit t % 32: expert e keeps token t; and how many it keeps of the words before
};

__device__ inline float score_of(uint32_t key) { return __uint_as_float((key & (kChosen - 1)) - 1); }
__device__ inline uint32_t key_of(uint32_t score) {  // of the bits of one outside [0, 1] that of 0
  return (score <= __float_as_uint(1.f) ? score : 0u) + 1;
}

// ---- mark ----------------------------------------------------------------------------------------------------------------------
constexpr int kMarkWarps = 16;
extern __shared__ __align__(16) uint32_t shared_memory[];

// The keys of a block's tokens, written by token and read by expert: four experts of a token stand together, at places that differ from token to token,
// so that both ways are free of bank conflicts.
struct MarkTile {
  int pitch;
  __host__ __device__ explicit MarkTile(int E) : pitch((E + 31) / 32 * 32) {}
  __device__ uint32_t* at(int column, int e) const { return shared_memory + column * pitch + ((e / 4 ^ column % 8) * 4 + e % 4); }
  static size_t bytes(int E, int tokens) { return sizeof(uint32_t) * static_cast<size_t>(tokens * MarkTile(E).pitch); }
};

// Any E and K.
__device__ inline void mark_by_bisection(const MarkTile& tile, int column, int E, int K, int lane) {
  uint32_t threshold = 0;
#pragma unroll 1
  for (int bit = 29; bit >= 0; bit--) {
    const uint32_t candidate = threshold | 1u << bit;
    int above = 0;
    for (int e = lane; e < E; e += 32) above += *tile.at(column, e) >= candidate;
    if (static_cast<int>(__reduce_add_sync(kAllLanes, above)) >= K) threshold = candidate;
  }
  int greater = 0;
  for (int e = lane; e < E; e += 32) greater += *tile.at(column, e) > threshold;
  int equals = K - static_cast<int>(__reduce_add_sync(kAllLanes, greater));  // those with the lowest ids
  for (int base = 0; base < E; base += 32) {
    const int e = base + lane;
    const uint32_t key = e < E ? *tile.at(column, e) : 0;
    const unsigned same = __ballot_sync(kAllLanes, e < E && key == threshold);
    const bool first = __popc(same & ((1u << lane) - 1)) < equals;
    if (e < E && (key > threshold || (key == threshold && first))) *tile.at(column, e) = key | kChosen;
    equals -= min(__popc(same), equals);
  }
}

// A warp per token and turn, kPerLane experts a lane; 0: any E and K, by bisection of the keys in shared memory. A lane loads kWidth neighbouring experts
// at once, where E and the address of the scores allow it.
template <int kPerLane>
constexpr int kMarkTokens = kPerLane > 0 ? 32 : 8;  // of a block: what shared memory holds

template <int kPerLane, int kWidth>
__global__ void __launch_bounds__(32 * kMarkWarps, kPerLane > 8 || kPerLane == 0 ? 3 : 4) mark_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
  constexpr int kTokens = kMarkTokens<kPerLane>, kAtOnce = 32 / kTokens, kVectors = std::max(kPerLane / kWidth, 1);
  using Vector = std::conditional_t<kWidth == 4, uint4, std::conditional_t<kWidth == 2, uint2, uint32_t>>;
  __shared__ ulonglong2 memory[kMarkWarps][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto T = static_cast<unsigned>(p.T), E = static_cast<unsigned>(p.E), first = blockIdx.x * kTokens;
  const MarkTile tile(p.E);
  const auto scores_of = [&](int turn) { return p.scores + uint64_t{min(first + turn * kMarkWarps + warp, T - 1)} * E; };
  const auto expert_at = [&](int v) { return (v * 32 + lane) * kWidth; };  // the first of vector v
  const auto there = [&](int v) { return v < kVectors / 2 || expert_at(v) < E; };
  // The scores of the warp's tokens, in flight at once where registers hold them.
  constexpr int kTurns = kTokens > kMarkWarps ? kTokens / kMarkWarps : 1, kAhead = kPerLane <= 4 ? kTurns : 1;
  Vector score[kAhead][kVectors];
  const auto load = [&](int turn, auto& into) {
    const uint32_t* scores = scores_of(turn);
#pragma unroll
    for (int v = 0; v < kVectors; v++) into[v] = there(v) ? *reinterpret_cast<const Vector*>(scores + expert_at(v)) : Vector{};
  };
  if constexpr (kAhead > 1)
    for (int turn = 0; turn < kTurns; turn++) load(turn, score[turn]);
#pragma unroll(kAhead)
  for (int turn = 0; turn < kTurns; turn++) {
    const int column = turn * kMarkWarps + warp;
    if (kTokens < kMarkWarps && column >= kTokens) break;
    if constexpr (kPerLane > 0) {
      if constexpr (kAhead == 1) load(turn, score[0]);
      auto& own = score[kAhead > 1 ? turn : 0];
      auto& key = reinterpret_cast<uint32_t(&)[kPerLane]>(own);
#pragma unroll
      for (int j = 0; j < kPerLane; j++) key[j] = key_of(key[j]);  // those past E are last: no real one is below 0 or has a higher index
      const Candidates found = find_candidates(key, p.K, lane);
      const bool ranked = found.total == p.K;
#pragma unroll
      for (int j = 0; j < kPerLane; j++)
        if (ranked && key[j] >= found.bound) key[j] |= kChosen;
#pragma unroll
      for (int v = 0; v < kVectors; v++)
        if (there(v)) *reinterpret_cast<Vector*>(tile.at(column, expert_at(v))) = own[v];
      if (!ranked) {
        __syncwarp();
        const Selected mine = rank_candidates<kWidth>(found, key, p.K, lane, memory[warp]);
        if (mine.rank < p.K) *tile.at(column, mine.index) |= kChosen;
      }
    } else {
      for (int e = lane; e < p.E; e += 32) *tile.at(column, e) = key_of(scores_of(turn)[e]);
      __syncwarp();
      mark_by_bisection(tile, column, p.E, p.K, lane);
    }
  }
  __syncthreads();
  const int column = lane % kTokens, step = 4 * kMarkWarps * kAtOnce;
  const bool valid = first + column < T;
  int e = 4 * (warp * kAtOnce + lane / kTokens);
  for (uint32_t* keys = p.keys + e * p.pitch + first + column; e < p.E; e += step, keys += step * p.pitch) {
    const uint4 key = *reinterpret_cast<const uint4*>(tile.at(column, e));
    keys[0] = valid ? key.x : 0u;
    keys[p.pitch] = valid ? key.y : 0u;
    keys[2 * p.pitch] = valid ? key.z : 0u;
    keys[3 * p.pitch] = valid ? key.w : 0u;
  }
}

// ---- select --------------------------------------------------------------------------------------------------------------------
constexpr int64_t kMaxSharedKeys = 48 * 1024;

// The rows that an expert keeps which is among the top K of f tokens; ~down where the sums of scores decide (NrS).
__device__ inline int target_of(const Params& p, int e, int f) {
  const int over = f % p.tile, down = f - over;
  if (!p.rounding || over == 0) return f;
  if (p.rule == RoundingRule::BalanceF) return p.out.counts[e];
  if (int64_t{down} + p.tile > p.T) return down;
  if (p.rule == RoundingRule::NrS) return ~down;
  return rounds_up(p.rule, f, p.tile, p.seed, static_cast<uint32_t>(e), 0.f, 0.f) ? down + p.tile : down;
}

// The keys of one expert, in shared memory or where mark left them.
template <bool kShared>
class ExpertKeys {
 public:
  __device__ ExpertKeys(const Params& p, int e) : pitch_(static_cast<int>(p.pitch)), keys_(p.keys + e * p.pitch) {
    int* const histogram = histogram_of_block();
    histogram[threadIdx.x] = histogram[kIndexThreads + threadIdx.x] = 0;
    __syncthreads();
    const auto* keys = reinterpret_cast<const uint4*>(keys_);
    constexpr int kLoads = 4;  // in flight
#pragma unroll 1
    for (int base = static_cast<int>(threadIdx.x); base < pitch_ / 4; base += kLoads * kIndexThreads) {
      uint4 k[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; j++)
        if (base + j * kIndexThreads < pitch_ / 4) k[j] = keys[base + j * kIndexThreads];
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        if (base + j * kIndexThreads >= pitch_ / 4) break;
        if constexpr (kShared) reinterpret_cast<uint4*>(shared_memory)[base + j * kIndexThreads] = k[j];
        for (const uint32_t key : {k[j].x, k[j].y, k[j].z, k[j].w}) atomicAdd(histogram + (key >> 20), 1);
      }
    }
    __syncthreads();
    const int digit = 2 * kIndexThreads - 1 - 2 * static_cast<int>(threadIdx.x);
    high_ = histogram[digit], low_ = histogram[digit - 1];
    before_ = sum_of_earlier_warps(high_ + low_, own_);
    __shared__ int f, target;
    if (threadIdx.x == kIndexThreads / 2) f = before_, target = target_of(p, e, before_);  // the digits from 1024 on: of chosen pairs
    __syncthreads();
    f_ = f, target_ = target;
  }
  __device__ int f() const { return f_; }  // among the top K of so many tokens
  __device__ int target() const { return target_; }
  template <class F>
  __device__ void each(F f) const {  // four keys at a time
    const auto* keys = reinterpret_cast<const uint4*>(this->keys());
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < pitch_ / 4; i += kIndexThreads) f(keys[i]);
  }
  template <class F>
  __device__ void each_from(uint32_t first, uint32_t count, F f) const {  // the few from `first` to first + count - 1
    each([&](uint4 k) {
      const uint32_t x = k.x - first, y = k.y - first, z = k.z - first, w = k.w - first;
      if (min(min(x, y), min(z, w)) >= count) return;
      if (x < count) f(k.x);
      if (y < count) f(k.y);
      if (z < count) f(k.z);
      if (w < count) f(k.w);
    });
  }
  struct Rank {
    uint32_t key;
    int kept, same;  // of exactly this key (not exact: of its highest digits): those of the first `count`, all
  };
  // The count-th largest key, 1 <= count <= T: below the counted digit two of 10 bits. All threads of the block call it. Not exact: or a key
  // that exactly `count` keys are not below, and kept == same.
  __device__ Rank ranked(int count, bool exact) const {
    int* const histogram = histogram_of_block();
    __shared__ Rank first, found;
    if (before_ < count && count <= before_ + own_) {
      const int before = before_ + warp_inclusive_sum(high_ + low_) - high_ - low_;
      const bool low = count > before + high_;
      const uint32_t digit = 2 * (kIndexThreads - threadIdx.x) - 1 - low;
      if (before < count && count <= before + high_ + low_) first = {digit, count - before - (low ? high_ : 0), low ? low_ : high_};
    }
    __syncthreads();
    Rank rank = first;
#pragma unroll 1
    for (int shift = 10; shift >= 0; shift -= 10) {
      if (!exact && rank.kept == rank.same) return {rank.key << (shift + 10), rank.kept, rank.same};
      histogram[threadIdx.x] = 0;
      __syncthreads();
      each_from(rank.key << (shift + 10), 1024u << shift, [&](uint32_t key) { atomicAdd(histogram + (key >> shift & 1023u), 1); });
      __syncthreads();
      const int digit = kIndexThreads - 1 - static_cast<int>(threadIdx.x), own = histogram[digit];
      int of_warp;
      const int earlier = sum_of_earlier_warps(own, of_warp);
      if (earlier < rank.kept && rank.kept <= earlier + of_warp) {
        const int before = earlier + warp_inclusive_sum(own) - own;
        if (before < rank.kept && rank.kept <= before + own) found = {rank.key << 10 | static_cast<uint32_t>(digit), rank.kept - before, own};
      }
      __syncthreads();
      rank = found;
    }
    return rank;
  }
  // The count-th token of exactly this key.
  __device__ int token_of(uint32_t key, int count) const {
    __shared__ int token;
    for (int base = 0; count > 0; base += kIndexThreads) {
      const int t = base + static_cast<int>(threadIdx.x);
      const int equal = t < pitch_ && keys()[t] == key;
      int total;
      const int before = exclusive_sum(equal, total);
      if (equal && before == count - 1) token = t;
      count -= total;
      __syncthreads();
    }
    return token;
  }
  // The tokens with larger keys, and those of exactly this key up to the last one.
  __device__ void write_members(uint32_t key, int last_token, uint2* members) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, words = pitch_ / 32;
    for (int base = 0, before = 0; base < words; base += kIndexThreads) {
      const int per_warp = (min(words - base, kIndexThreads) + 31) / 32, first = base + warp * per_warp, count = min(words - first, per_warp);
      const uint32_t* keys = this->keys() + first * 32 + lane;
      uint32_t mask = 0;  // of word first + lane
      const auto collect = [&](auto kept) {
#pragma unroll 8
        for (int i = 0; i < count; i++) {
          const uint32_t all = __ballot_sync(kAllLanes, kept(keys[32 * i], i));
          if (lane == i) mask = all;
        }
      };
      if (last_token == INT_MAX) collect([&](uint32_t own, int) { return own >= key; });
      else collect([&](uint32_t own, int i) { return own > key || (own == key && (first + i) * 32 + lane <= last_token); });
      int total;
      const int earlier = before + exclusive_sum(__popc(mask), total);
      if (lane < count) members[first + lane] = {mask, static_cast<unsigned>(earlier)};
      before += total;
    }
  }

 private:
  __device__ const uint32_t* keys() const {
    if constexpr (kShared) return shared_memory;
    else return keys_;
  }
  __device__ static int* histogram_of_block() {
    __shared__ int histogram[2 * kIndexThreads];
    return histogram;
  }
  int pitch_;
  const uint32_t* keys_;
  int f_, target_;
  int before_, own_;  // keys by their highest 11 bits: how many have values of earlier warps, of this one,
  int high_, low_;    // the larger and the other one of the thread's two values
};

__global__ void __launch_bounds__(kIndexThreads, 1) count_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
  const auto* keys = reinterpret_cast<const uint4*>(p.keys + blockIdx.x * p.pitch);
  int chosen = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < p.pitch / 4; i += kIndexThreads) {
    const uint4 k = keys[i];
    chosen += static_cast<int>((k.x >> 30) + (k.y >> 30) + (k.z >> 30) + (k.w >> 30));
  }
  chosen = block_sum(chosen);
  if (threadIdx.x == 0) p.topk_count[blockIdx.x] = chosen;
}

__global__ void balance_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
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

// NrS: sums of the scores of ranks down .. f - 1 and down .. up - 1, added in rank order. high, low: the keys of ranks down - 1 (any, if down is 0)
// and up - 1.
template <class Keys>
__device__ void score_sums(const Keys& keys, typename Keys::Rank high, typename Keys::Rank low, int down, int up, float& below, float& span) {
  __shared__ uint32_t between[kMaxScoredTile];
  __shared__ float sorted[kMaxScoredTile];
  __shared__ int filled;
  __shared__ float sums[2];
  const int from_high = min(high.same - high.kept, up - down);  // further tokens with the key of rank down - 1
  if (threadIdx.x == 0) filled = 0;
  __syncthreads();
  keys.each_from(low.key + 1, max(high.key - low.key, 1u) - 1, [&](uint32_t key) { between[atomicAdd(&filled, 1)] = key; });
  __syncthreads();
  const int count = filled;
  for (int i = threadIdx.x; i < up - down; i += kIndexThreads) {
    if (i >= count) continue;
    int rank = from_high;
    for (int j = 0; j < count; j++) rank += between[j] > between[i] || (between[j] == between[i] && j < i);
    sorted[rank] = score_of(between[i]);
  }
  for (int i = threadIdx.x; i < up - down; i += kIndexThreads)
    if (i < from_high || i >= from_high + count) sorted[i] = score_of(i < from_high ? high.key : low.key);
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    int i = 0;
    for (; i < keys.f() - down; i++) sum += sorted[i];
    sums[0] = sum;
    for (; i < up - down; i++) sum += sorted[i];
    sums[1] = sum;
  }
  __syncthreads();
  below = sums[0];
  span = sums[1];
}

template <bool kShared>
__global__ void __launch_bounds__(kIndexThreads, kShared ? 2 : 1) select_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
  using Rank = typename ExpertKeys<kShared>::Rank;
  const int e = blockIdx.x;
  const ExpertKeys<kShared> keys(p, e);
  int target = keys.target();
  Rank last{~0u, 0, 0};  // of the last kept token
  if (target < 0) {
    const int f = keys.f(), down = ~target, up = down + p.tile;
    const Rank high = down > 0 ? keys.ranked(down, true) : last, low = keys.ranked(up, true);
    float below, span;
    score_sums(keys, high, low, down, up, below, span);
    const bool pad = rounds_up(p.rule, f, p.tile, p.seed, static_cast<uint32_t>(e), below, span);
    target = pad ? up : down;
    last = pad ? low : high;
  } else if (target > 0) {
    last = keys.ranked(target, false);
  }
  const int last_token = last.kept < last.same ? keys.token_of(last.key, last.kept) : INT_MAX;
  keys.write_members(last.key, last_token, p.members + e * (p.pitch / 32));
  if (threadIdx.x == 0) p.out.counts[e] = target;
}

// ---- rows ----------------------------------------------------------------------------------------------------------------------
constexpr int kRowsThreads = 256;  // of 32 tokens
// Blocks beside those of the tokens, for the work lists and the expert of each row: more for more of them, lest they be the last to end.
__host__ __device__ constexpr int list_blocks(int64_t E, int64_t R_cap) {
  const auto for_rows = static_cast<int>(R_cap / 4096 < 128 ? R_cap / 4096 : 128), for_lists = work_blocks(E) * kIndexThreads / kRowsThreads;
  return for_rows > for_lists ? for_rows : for_lists;
}

// A 32 x 32 matrix of bits over its diagonal, a row in each lane.
__device__ inline uint32_t transposed(uint32_t row, int lane) {
#pragma unroll
  for (int i = 16, low = 0xffff; i > 0; i /= 2, low ^= low << i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, row, i);
    row = lane & i ? (row & ~low) | (other >> i & low) : (row & low) | (other << i & ~low);
  }
  return row;
}

struct RowsMemory {
  int words, pitch;  // of 32 experts; odd
  uint2* place;      // [32 words] which of the tokens the expert keeps, and the row of the first of them
  uint32_t* bits;    // [32][pitch] which of 32 experts the token keeps,
  int* slot;         // the slot of the first of these, counted from that of the block,
  float* sum;        // and the sum of their scores
  __device__ explicit RowsMemory(int E)
      : words((E + 31) / 32),
        pitch(words | 1),
        place(reinterpret_cast<uint2*>(shared_memory)),
        bits(shared_memory + 64 * words),
        slot(reinterpret_cast<int*>(bits + 32 * pitch)),
        sum(reinterpret_cast<float*>(slot + 32 * pitch)) {}
  static size_t bytes(int64_t E) {  // ExpertScan takes less
    const int64_t words = (E + 31) / 32;
    return sizeof(uint32_t) * static_cast<size_t>(64 * words + 96 * (words | 1));
  }
};

// The expert of each row: a warp takes 256 rows in a row, 32 at a time.
__device__ inline void write_experts(const ExpertScan& scan, int E, int block, int blocks, int* expert) {
  constexpr int kRun = 256, kWarps = kRowsThreads / 32;
  const int lane = threadIdx.x % 32, warp = block * kWarps + threadIdx.x / 32;
  for (int64_t base = int64_t{warp} * kRun; base < scan.rows[E]; base += int64_t{blocks} * kWarps * kRun) {
    int64_t row = base + lane;
    int e = expert_of(scan.rows, E, static_cast<int>(row));
    for (const int64_t end = min(base + kRun, int64_t{scan.rows[E]}); row < end; row += 32) {
      while (row >= scan.rows[e + 1]) e++;
      expert[row] = e;
    }
  }
}

__global__ void __launch_bounds__(kRowsThreads, 5) rows_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
  const int lists = list_blocks(p.E, p.R_cap);
  if (static_cast<int>(blockIdx.x) < lists) {
    ExpertScan scan(reinterpret_cast<int*>(shared_memory), p.E);
    scan.run<kRowsThreads>(p.E, p.R_cap, [&](int i) { return p.out.counts[i]; });
    write_work<kRowsThreads>(scan, p.E, blockIdx.x, lists, nullptr, p.out.offsets, p.work);
    write_experts(scan, p.E, static_cast<int>(blockIdx.x), lists, p.out.expert);
    return;
  }
  const int block = static_cast<int>(blockIdx.x) - lists, token_words = static_cast<int>(p.pitch / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowsMemory m(p.E);

  int64_t rows = 0;  // of the experts so far, and below of these the ones of earlier tokens
  for (int base = 0; base < p.E; base += kRowsThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    const uint2 member = e < p.E && block < token_words ? p.members[int64_t{e} * token_words + block] : uint2{};
    int64_t total;
    const int64_t before = rows + exclusive_sum(int64_t{e < p.E ? p.out.counts[e] : 0} << 32 | member.y, total);
    rows += total;
    if (e < 32 * m.words) {
      m.place[e] = {member.x, static_cast<unsigned>(before >> 32) + member.y};
      m.bits[lane * m.pitch + e / 32] = transposed(member.x, lane);
    }
  }
  const int R = static_cast<int>(rows >> 32), first_slot = static_cast<int>(rows);
  __syncthreads();

  if (p.renormalize)
    for (int word = warp; word < m.words; word += kRowsThreads / 32) {
      constexpr int kLoads = 4;  // in flight
      const uint32_t* keys = p.keys + int64_t{word} * 32 * p.pitch + int64_t{block} * 32 + lane;
      float sum = 0.f;
#pragma unroll 1
      for (uint32_t mask = m.bits[lane * m.pitch + word]; mask != 0;) {
        uint32_t key[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; j++, mask &= mask - 1) key[j] = mask != 0 ? keys[(__ffs(mask) - 1) * p.pitch] : key_of(0u);
#pragma unroll
        for (int j = 0; j < kLoads; j++) sum += score_of(key[j]);
      }
      m.sum[lane * m.pitch + word] = sum;
    }
  __shared__ int first_of_token[32], slots_of_block;
  if (warp == kRowsThreads / 32 - 1) {  // mostly without a word above
    int own = 0;
    for (int word = 0; word < m.words; word++) own += __popc(m.bits[lane * m.pitch + word]);
    const int end = warp_inclusive_sum(own);
    if (lane == 31) slots_of_block = end;
    int slot = first_of_token[lane] = end - own;
    const int64_t t = int64_t{block} * 32 + lane;
    if (t < p.T) p.out.token_offsets[t] = first_slot + slot;
    for (int word = 0; word < m.words; word++) {
      m.slot[lane * m.pitch + word] = slot;
      slot += __popc(m.bits[lane * m.pitch + word]);
    }
  }
  __syncthreads();

  auto* score = static_cast<float*>(p.out.score);
  for (int slot = static_cast<int>(threadIdx.x); slot < slots_of_block; slot += kRowsThreads) {
    const int column = expert_of(first_of_token, 32, slot), word = expert_of(m.slot + column * m.pitch, m.words, slot);
    const int at = column * m.pitch + word;
    uint32_t mask = m.bits[at];
    for (int i = m.slot[at]; i < slot; i++) mask &= mask - 1;
    const int e = word * 32 + __ffs(mask) - 1, t = block * 32 + column;
    const uint2 place = m.place[e];
    const int row = static_cast<int>(place.y) + __popc(place.x & ((1u << column) - 1));
    float value = score_of(p.keys[e * p.pitch + t]), sum = 0.f;
    if (p.renormalize)
      for (int i = 0; i < m.words; i++) sum += m.sum[column * m.pitch + i];
    if (sum > 0.f) value /= sum;
    p.out.inverse[first_slot + slot] = row;
    p.out.token[row] = t;
    score[row] = value;
  }

  const int64_t thread = int64_t{block} * kRowsThreads + threadIdx.x, threads = int64_t{static_cast<int>(gridDim.x) - lists} * kRowsThreads;
  if (thread == 0) p.out.token_offsets[p.T] = R;
  for (int64_t row = R + thread; row < p.R_cap; row += threads) {
    clear_row(p.out, row);
    p.out.inverse[row] = -1;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------------------
struct Scratch {
  uint32_t* keys;
  uint2* members;
  int* topk_count;
};
int64_t pitch_of(int64_t T) { return (T + 31) / 32 * 32; }
Scratch book(const Shape& s, Workspace& ws) {
  Scratch b{};
  b.keys = ws.take<uint32_t>(pitch_of(s.T) * ((s.E + 3) / 4 * 4));
  b.members = ws.take<uint2>(pitch_of(s.T) / 32 * s.E);
  b.topk_count = ws.take<int>(s.E);
  return b;
}

void launch_mark(const Params& p, Stream stream) {
  const auto run = [&]<int kPerLane>() {
    constexpr int kTokens = kMarkTokens<kPerLane>, kWidth = std::clamp(kPerLane, 1, 4);
    const bool wide = p.E % kWidth == 0 && reinterpret_cast<uintptr_t>(p.scores) % (sizeof(float) * kWidth) == 0;
    launch_kernel(wide ? mark_kernel<kPerLane, kWidth> : mark_kernel<kPerLane, 1>, static_cast<unsigned>(p.pitch / kTokens), 32 * kMarkWarps,
                  MarkTile::bytes(p.E, kTokens), stream, p);
  };
  if (p.E > 512 || p.K > kMaxSelected) run.template operator()<0>();
  else if (p.E <= 32) run.template operator()<1>();
  else if (p.E <= 64) run.template operator()<2>();
  else if (p.E <= 128) run.template operator()<4>();
  else if (p.E <= 256) run.template operator()<8>();
  else run.template operator()<16>();
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
  MACHMOE_SUPPORTED(a.rule != RoundingRule::NrS || a.tile <= kMaxScoredTile, "tile is {}, expected at most {} with the rule NR-s on CUDA", a.tile,
                    kMaxScoredTile);
  Workspace ws(a.scratch);
  const Scratch b = book(s, ws);
  const Params p{s.T,
                 s.R_cap,
                 pitch_of(s.T),
                 static_cast<int>(s.E),
                 static_cast<int>(a.K),
                 static_cast<int>(a.tile),
                 s.T >= a.tile,
                 a.rule,
                 a.renormalize,
                 a.seed,
                 reinterpret_cast<const uint32_t*>(a.scores),
                 a.out,
                 work_list(a.out.tiles, s.E),
                 b.keys,
                 b.topk_count,
                 b.members};
  const auto experts = static_cast<unsigned>(s.E);
  if (s.T > 0) launch_mark(p, stream);
  if (p.rounding && a.rule == RoundingRule::BalanceF) {
    launch_kernel(count_kernel, experts, kIndexThreads, 0, stream, p);
    launch_kernel(balance_kernel, 1, 256, 0, stream, p);
  }
  const bool shared = p.pitch <= kMaxSharedKeys;
  launch_kernel(shared ? select_kernel<true> : select_kernel<false>, experts, kIndexThreads,
                shared ? sizeof(uint32_t) * static_cast<size_t>(p.pitch) : 0, stream, p);
  const auto words = static_cast<unsigned>(std::max<int64_t>(1, p.pitch / 32));
  launch_kernel(rows_kernel, list_blocks(s.E, s.R_cap) + words, kRowsThreads, RowsMemory::bytes(s.E), stream, p);
}

}  // namespace machmoe::cuda
