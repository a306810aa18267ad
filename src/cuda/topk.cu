// Top-K router, forward and backward, with exact scores. The renormalised softmax of the selected experts equals the softmax over their logits,
// so two of the three kinds share one formula.
#include <algorithm>

#include "core/workspace.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/router.cuh"
#include "cuda/score_grad.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kMaxBlocks = 264;  // partial sums over tokens: a constant, so that no bit depends on the device
constexpr int kMaxK = 128;

template <class Logit>
struct TopkParams {
  int64_t T;
  int E, K;
  bool over_all;  // softmax over all experts, not over the selected
  const Logit* logits;
  int* ids;
  float* weights;
  int* finished;       // set to 0 for topk_sum_kernel
  int* block_counts;   // [blocks][E]
  float* block_probs;  // [blocks][E] sums of the softmax over all experts; null: no aux
};

// ---- E <= 512, K <= 16: a warp per token, everything in registers ------------------------------------------------------------
// 16 kPerLane < E <= 32 kPerLane, or E <= 32.
// Two blocks on an SM, with as many warps as their registers allow.
constexpr int kSmallE = 512;
constexpr int token_warps(int per_lane) { return per_lane <= 4 ? 24 : per_lane == 8 ? 18 : 10; }

template <int kPerLane, class Logit>
__global__ void __launch_bounds__(32 * token_warps(kPerLane), 2) topk_warp_kernel(const __grid_constant__ TopkParams<Logit> p) {
  cudaGridDependencySynchronize();
  constexpr int kWarps = token_warps(kPerLane), kColumns = 32 * kPerLane;
  __shared__ ulonglong2 memory[kWarps][16];
  __shared__ float prob_sum[kWarps][kColumns];
  __shared__ int count_sum[kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.finished = 0;
  for (int e = threadIdx.x; e < kColumns; e += blockDim.x) count_sum[e] = 0;
  __syncthreads();
  const bool all = p.over_all || p.block_probs;
  float probs[kPerLane] = {};
  const auto T = static_cast<unsigned>(p.T);
  for (unsigned first = blockIdx.x; first < T; first += warps * gridDim.x) {  // as many turns in every warp
    const unsigned own = first + warp * gridDim.x;
    const bool valid = own < T;
    const unsigned t = valid ? own : first;
    const Logit* row = p.logits + uint64_t{t} * p.E + lane;
    float x[kPerLane];
    uint32_t key[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; j++) x[j] = j < kPerLane / 2 || j * 32 + lane < p.E ? static_cast<float>(row[j * 32]) : -INFINITY;
#pragma unroll
    for (int j = 0; j < kPerLane; j++) key[j] = order_key(x[j]);  // those past E are last: no real one ranks below -infinity or has a higher index
    const Selected mine = rank_candidates<1>(find_candidates(key, p.K, lane), key, p.K, lane, memory[warp]);
    const bool selected = mine.rank < p.K;
    const float top = value_of(__reduce_max_sync(kAllLanes, mine.key));
    float weight = selected ? exp_of(value_of(mine.key) - top) : 0.f, sum = 0.f;
    if (all) {
      float exponential[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; j++) sum += exponential[j] = exp_of(x[j] - top);
      sum = warp_sum(sum);
      const float scale = valid ? rcp_approx(sum) : 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; j++) probs[j] += exponential[j] * scale;
    }
    if (!p.over_all) sum = warp_sum(weight);
    if (selected && valid) {
      const unsigned slot = t * p.K + mine.rank;
      p.ids[slot] = mine.index;
      p.weights[slot] = weight * rcp_approx(sum);
      atomicAdd(count_sum + mine.index, 1);
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; j++) prob_sum[warp][j * 32 + lane] = probs[j];
  __syncthreads();
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
    p.block_counts[int64_t{blockIdx.x} * p.E + e] = count_sum[e];
    if (!p.block_probs) continue;
    float sum = 0.f;
#pragma unroll 4
    for (int w = 0; w < warps; w++) sum += prob_sum[w][e];
    p.block_probs[int64_t{blockIdx.x} * p.E + e] = sum;
  }
}

// ---- E <= 4096, K <= 128: a block per token, the K-th key found bit by bit -------------------------------------------------------
constexpr int kThreads = 256, kOwned = kMaxExperts / kThreads;

// The warps' values, the same in all lanes of a warp, in the order of the warps.
template <class T, class Op>
__device__ T over_warps(T v, Op op) {
  __shared__ T parts[kThreads / 32];
  __syncthreads();  // the parts of the call before have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < kThreads / 32; w++) all = op(all, parts[w]);
  return all;
}
__device__ float block_sum(float v) {
  return over_warps(warp_sum(v), [](float a, float b) { return a + b; });
}
__device__ int block_sum_int(int v) {
  return over_warps(static_cast<int>(__reduce_add_sync(kAllLanes, v)), [](int a, int b) { return a + b; });
}
__device__ int block_min(int v) {
  return over_warps(static_cast<int>(__reduce_min_sync(kAllLanes, v)), [](int a, int b) { return min(a, b); });
}

template <class Logit>
__global__ void __launch_bounds__(kThreads) topk_block_kernel(const __grid_constant__ TopkParams<Logit> p) {
  cudaGridDependencySynchronize();
  __shared__ uint64_t chosen[kMaxK];  // key, then the lower id
  __shared__ int ranked[kMaxK];
  __shared__ int filled;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.finished = 0;
  int count[kOwned] = {};
  float probs[kOwned] = {};
  for (int64_t t = blockIdx.x; t < p.T; t += gridDim.x) {
    const Logit* row = p.logits + t * p.E;
    uint32_t key[kOwned];
#pragma unroll
    for (int j = 0; j < kOwned; j++) {
      const int e = j * kThreads + static_cast<int>(threadIdx.x);
      key[j] = e < p.E ? order_key(static_cast<float>(row[e])) : 0;
    }
    uint32_t threshold = 0;  // the K-th largest key
    for (int bit = 31; bit >= 0; bit--) {
      const uint32_t candidate = threshold | 1u << bit;
      int above = 0;
#pragma unroll
      for (int j = 0; j < kOwned; j++) above += key[j] >= candidate;
      if (block_sum_int(above) >= p.K) threshold = candidate;
    }
    if (threadIdx.x == 0) filled = 0;
    __syncthreads();
    auto choose = [&](int j, int e) {
      chosen[atomicAdd(&filled, 1)] = uint64_t{key[j]} << 32 | (0xFFFFFFFFu - static_cast<unsigned>(e));
      count[j]++;
    };
#pragma unroll
    for (int j = 0; j < kOwned; j++)
      if (key[j] > threshold) choose(j, j * kThreads + static_cast<int>(threadIdx.x));
    __syncthreads();
    for (int last = -1, left = p.K - filled; left > 0; left--) {  // of the equal keys those with the lowest ids
      int lowest = kMaxExperts;
#pragma unroll
      for (int j = kOwned - 1; j >= 0; j--) {
        const int e = j * kThreads + static_cast<int>(threadIdx.x);
        if (key[j] == threshold && e > last) lowest = e;
      }
      last = block_min(lowest);
#pragma unroll
      for (int j = 0; j < kOwned; j++)
        if (last == j * kThreads + static_cast<int>(threadIdx.x)) choose(j, last);
    }
    __syncthreads();
    const bool selected = static_cast<int>(threadIdx.x) < p.K;
    if (selected) {  // the order of `chosen` is any: from here on thread k has the selected expert of rank k
      const uint64_t own = chosen[threadIdx.x];
      int rank = 0;
      for (int k = 0; k < p.K; k++) rank += chosen[k] > own;
      ranked[rank] = static_cast<int>(0xFFFFFFFFu - static_cast<unsigned>(own));
    }
    __syncthreads();
    const int id = selected ? ranked[threadIdx.x] : 0;
    const float top = static_cast<float>(row[ranked[0]]), weight = selected ? expf(static_cast<float>(row[id]) - top) : 0.f;
    float sum = 0.f;
    if (p.over_all || p.block_probs) {
      float part = 0.f;
      for (int e = threadIdx.x; e < p.E; e += kThreads) part += expf(static_cast<float>(row[e]) - top);
      sum = block_sum(part);
      if (p.block_probs)
#pragma unroll
        for (int j = 0; j < kOwned; j++) {
          const int e = j * kThreads + static_cast<int>(threadIdx.x);
          if (e < p.E) probs[j] += expf(static_cast<float>(row[e]) - top) / sum;
        }
    }
    if (!p.over_all) sum = block_sum(weight);
    if (selected) {
      p.ids[t * p.K + threadIdx.x] = id;
      p.weights[t * p.K + threadIdx.x] = weight / sum;
    }
  }
#pragma unroll
  for (int j = 0; j < kOwned; j++) {
    const int e = j * kThreads + static_cast<int>(threadIdx.x);
    if (e >= p.E) continue;
    p.block_counts[int64_t{blockIdx.x} * p.E + e] = count[j];
    if (p.block_probs) p.block_probs[int64_t{blockIdx.x} * p.E + e] = probs[j];
  }
}

// ---- sums over the blocks, in order --------------------------------------------------------------------------------------------
// A block for 32 experts; the last one to finish adds up their losses.
constexpr int kSumWarps = 32, kSumLoads = (kMaxBlocks + kSumWarps - 1) / kSumWarps;  // all loads of a thread at once

struct SumParams {
  int E, K, blocks;
  int64_t T;
  const int* block_counts;
  const float* block_probs;
  int* finished;
  float* losses;  // [blocks of the grid]
  int* counts;
  float* aux;
};

__global__ void __launch_bounds__(32 * kSumWarps) topk_sum_kernel(const __grid_constant__ SumParams p) {
  cudaGridDependencySynchronize();
  __shared__ int count_part[kSumWarps][32];
  __shared__ float prob_part[kSumWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = static_cast<int>(blockIdx.x) * 32 + lane;
  int count = 0;
  float prob = 0.f;
  for (int base = warp; base < p.blocks; base += kSumWarps * kSumLoads)
#pragma unroll
    for (int i = 0; i < kSumLoads; i++) {
      const int b = base + i * kSumWarps;
      if (b >= p.blocks || e >= p.E) continue;
      count += p.block_counts[int64_t{b} * p.E + e];
      if (p.aux) prob += p.block_probs[int64_t{b} * p.E + e];
    }
  count_part[warp][lane] = count;
  prob_part[warp][lane] = prob;
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; w++) {
    count += count_part[w][lane];
    prob += prob_part[w][lane];
  }
  if (e < p.E) p.counts[e] = count;
  if (!p.aux) return;
  const float load = p.T > 0 ? static_cast<float>(count) / static_cast<float>(p.T * p.K) : 0.f;
  float loss = p.T > 0 && e < p.E ? static_cast<float>(p.E) * load * (prob / static_cast<float>(p.T)) : 0.f;
  loss = warp_sum(loss);
  int before = 0;
  if (lane == 0) {
    p.losses[blockIdx.x] = loss;
    __threadfence();
    before = atomicAdd(p.finished, 1);
  }
  if (__shfl_sync(kAllLanes, before, 0) != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  loss = 0.f;
  for (int b = lane; b < gridDim.x; b += 32) loss += __ldcg(p.losses + b);
  loss = warp_sum(loss);
  if (lane == 0) *p.aux = loss;
}

// ---- backward ------------------------------------------------------------------------------------------------------------------
template <class Logit>
struct BackwardParams {
  int64_t T;
  int E, K;
  bool over_all;
  const Logit* logits;
  const int* ids;
  const float* weights;
  const int* counts;
  const float* dweights;
  const float* ds_parts;
  int64_t parts;
  const int* inverse;
  int64_t R_cap;
  const float* daux;
  Logit* dlogits;
};

template <class Logit>
__device__ float slot_gradient(const BackwardParams<Logit>& p, int64_t slot) {
  if (p.dweights) return p.dweights[slot];
  const int row = p.inverse[slot];
  return row < 0 ? 0.f : score_gradient(p.ds_parts, p.parts, p.R_cap, row);
}

// A warp per token; its gradient is put together in shared memory.
template <class Logit>
__global__ void __launch_bounds__(256) topk_backward_kernel(const __grid_constant__ BackwardParams<Logit> p) {
  cudaGridDependencySynchronize();
  extern __shared__ float gradients[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* d = gradients + int64_t{warp} * p.E;
  const float aux_scale = p.daux ? *p.daux * static_cast<float>(p.E) / (static_cast<float>(p.T * p.K) * static_cast<float>(p.T)) : 0.f;
  for (int64_t t = int64_t{blockIdx.x} * warps + warp; t < p.T; t += int64_t{gridDim.x} * warps) {
    const Logit* row = p.logits + t * p.E;
    for (int e = lane; e < p.E; e += 32) d[e] = 0.f;
    __syncwarp();
    float mean = 0.f;  // sum of w dw over the selected: the softmax's own term
    for (int k = lane; k < p.K; k += 32) {
      const int64_t slot = t * p.K + k;
      const float ds = slot_gradient(p, slot);
      d[p.ids[slot]] = ds;
      mean += p.weights[slot] * ds;
    }
    mean = warp_sum(mean);
    __syncwarp();
    float top = -INFINITY, sum = 0.f, load = 0.f;
    if (p.over_all || p.daux) {
      for (int e = lane; e < p.E; e += 32) top = fmaxf(top, static_cast<float>(row[e]));
      top = warp_max(top);
      for (int e = lane; e < p.E; e += 32) sum += expf(static_cast<float>(row[e]) - top);
      sum = warp_sum(sum);
      if (p.daux)
        for (int e = lane; e < p.E; e += 32) load += static_cast<float>(p.counts[e]) * (expf(static_cast<float>(row[e]) - top) / sum);
      load = warp_sum(load);
    }
    if (!p.over_all)
      for (int k = lane; k < p.K; k += 32) {
        const int e = p.ids[t * p.K + k];
        d[e] = p.weights[t * p.K + k] * (d[e] - mean);
      }
    __syncwarp();
    for (int e = lane; e < p.E; e += 32) {
      float gradient = d[e];
      if (p.over_all || p.daux) {
        const float prob = expf(static_cast<float>(row[e]) - top) / sum;
        if (p.over_all) gradient = prob * (gradient - mean);
        if (p.daux) gradient += aux_scale * prob * (static_cast<float>(p.counts[e]) - load);
      }
      p.dlogits[t * p.E + e] = static_cast<Logit>(gradient);
    }
    __syncwarp();
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------------------
template <class F>
void dispatch_logits(DType dtype, F&& f) {
  MACHMOE_SUPPORTED(dtype != DType::F64, "logits_dtype is F64, expected F32, BF16 or F16 on CUDA: cast the logits");
  if (dtype == DType::BF16) f(__nv_bfloat16{});
  else if (dtype == DType::F16) f(__half{});
  else f(float{});
}
void check_size(int64_t E, int64_t K) {
  MACHMOE_SUPPORTED(E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", E, kMaxExperts);
  MACHMOE_SUPPORTED(K <= kMaxK, "K is {}, expected at most {} experts per token on CUDA", K, kMaxK);
}
bool fits_warp(int64_t E, int64_t K) { return E <= kSmallE && K <= kMaxSelected; }
// Where tokens are few, they are spread over all SMs.
int64_t blocks_of(int64_t T, int64_t E, int64_t K) {
  const bool warps = fits_warp(E, K);
  return std::clamp<int64_t>(warps ? (T + 7) / 8 : T, 1, warps ? kMaxBlocks : 4 * kMaxBlocks);
}

struct Scratch {
  int* finished;
  float* losses;
  int* counts;
  float* probs;
};
Scratch book(int64_t T, int64_t E, int64_t K, Workspace& ws) {
  const int64_t items = blocks_of(T, E, K) * E;
  int* finished = ws.take<int>(1);
  auto* losses = ws.take<float>((E + 31) / 32);
  int* counts = ws.take<int>(items);
  return {finished, losses, counts, ws.take<float>(items)};
}

template <class Logit>
void launch_topk(const TopkParams<Logit>& p, unsigned blocks, Stream stream) {
  const auto run = [&]<int kPerLane>() {
    const auto warps = static_cast<unsigned>(std::clamp<int64_t>((p.T + blocks - 1) / blocks, 1, token_warps(kPerLane)));
    launch_kernel(topk_warp_kernel<kPerLane, Logit>, blocks, 32 * warps, 0, stream, p);
  };
  if (!fits_warp(p.E, p.K)) launch_kernel(topk_block_kernel<Logit>, blocks, kThreads, 0, stream, p);
  else if (p.E <= 32) run.template operator()<1>();
  else if (p.E <= 64) run.template operator()<2>();
  else if (p.E <= 128) run.template operator()<4>();
  else if (p.E <= 256) run.template operator()<8>();
  else run.template operator()<16>();
}

}  // namespace

size_t topk_scratch(int64_t T, int64_t E, int64_t K) {
  Workspace ws;
  book(T, E, K, ws);
  return ws.used();
}

void topk(const TopkArgs& a, Stream stream) {
  check_size(a.E, a.K);
  Workspace ws(a.scratch);
  const Scratch b = book(a.T, a.E, a.K, ws);
  const auto blocks = static_cast<unsigned>(blocks_of(a.T, a.E, a.K));
  dispatch_logits(a.logits_dtype, [&](auto logit) {
    using Logit = decltype(logit);
    launch_topk<Logit>({a.T, static_cast<int>(a.E), static_cast<int>(a.K), a.kind == RouterKind::SoftmaxTopk, static_cast<const Logit*>(a.logits),
                        a.ids, static_cast<float*>(a.weights), b.finished, b.counts, a.aux ? b.probs : nullptr},
                       blocks, stream);
  });
  launch_kernel(topk_sum_kernel, static_cast<unsigned>((a.E + 31) / 32), 32 * kSumWarps, 0, stream,
                {static_cast<int>(a.E), static_cast<int>(a.K), static_cast<int>(blocks), a.T, b.counts, b.probs, b.finished, b.losses, a.counts,
                 static_cast<float*>(a.aux)});
}

void topk_backward(const TopkBackwardArgs& a, Stream stream) {
  check_size(a.E, a.K);
  if (a.T == 0) return;
  const int64_t row = a.E * static_cast<int64_t>(sizeof(float)), warps = std::clamp<int64_t>(40 * 1024 / row, 2, 8), smem = warps * row;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((a.T + warps - 1) / warps, 8 * num_sms()));
  dispatch_logits(a.logits_dtype, [&](auto logit) {
    using Logit = decltype(logit);
    const BackwardParams<Logit> p{a.T,
                                  static_cast<int>(a.E),
                                  static_cast<int>(a.K),
                                  a.kind == RouterKind::SoftmaxTopk,
                                  static_cast<const Logit*>(a.logits),
                                  a.ids,
                                  static_cast<const float*>(a.weights),
                                  a.counts,
                                  static_cast<const float*>(a.dweights),
                                  static_cast<const float*>(a.ds_parts),
                                  a.parts,
                                  a.inverse,
                                  a.R_cap,
                                  static_cast<const float*>(a.daux),
                                  static_cast<Logit*>(a.dlogits)};
    launch_kernel(topk_backward_kernel<Logit>, blocks, static_cast<unsigned>(32 * warps), static_cast<size_t>(smem), stream, p);
  });
}

}  // namespace machmoe::cuda
