// Top-K router. A warp takes a token: its logits lie in shared memory, each round finds the largest key left. Two launches forward (selection with
// partial sums per block; counts and loss from them), one backward. Sums over tokens have a fixed order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "core/workspace.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/score_grad.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;

// Blocks of the selection: a function of the shape alone, so that the order of the sums is too.
int64_t blocks_of(int64_t T) { return std::clamp<int64_t>((T + kWarps - 1) / kWarps, 1, 528); }

// Order-preserving bits of a float; NaN ranks highest.
__device__ uint32_t sortable(float x) {
  const uint32_t bits = __float_as_uint(isnan(x) ? INFINITY : x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float warp_sum(float v) {
#pragma unroll
  for (int delta = 16; delta; delta /= 2) v += __shfl_xor_sync(~0u, v, delta);
  return v;
}

struct TopkParams {
  int64_t T;
  int E, K;
  RouterKind kind;
  int* ids;
  float* weights;
  int* counts;              // [E]
  float* aux;
  int* block_counts;        // [blocks][E]
  float* block_sums;        // [blocks][E] sums of softmax(logits), with aux
};
extern __shared__ float shared_floats[];

// max and sum of exp(x - max) over a row.
struct Softmax {
  float top, sum;
  __device__ float operator()(float x) const { return __expf(x - top) / sum; }
};
__device__ Softmax softmax_of(const float* x, int E, int lane, float top) {
  float sum = 0.f;
  for (int e = lane; e < E; e += 32) sum += __expf(x[e] - top);
  return {top, warp_sum(sum)};
}

template <class Logit> __global__ void __launch_bounds__(kThreads) topk_kernel(const __grid_constant__ TopkParams p, const Logit* logits) {
  // per warp: logits [E], keys [E], probability sums [E]; per block: counts [E]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* x = shared_floats + warp * 3 * p.E;
  auto* keys = reinterpret_cast<uint32_t*>(x + p.E);
  float* sums = x + 2 * p.E;
  int* counts = reinterpret_cast<int*>(shared_floats + kWarps * 3 * p.E);
  for (int e = threadIdx.x; e < p.E; e += kThreads) counts[e] = 0;
  for (int e = lane; e < p.E; e += 32) sums[e] = 0.f;
  __syncthreads();
  const bool all = p.aux || p.kind == RouterKind::SoftmaxTopk;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp; t < p.T; t += int64_t{gridDim.x} * kWarps) {
    uint32_t best = 0;   // of this lane's experts; their first one with that key is found again by its id
    int best_id = p.E;
    for (int e = lane; e < p.E; e += 32) {
      x[e] = static_cast<float>(logits[t * p.E + e]);
      const uint32_t key = keys[e] = sortable(x[e]);
      if (key > best) best = key, best_id = e;
    }
    __syncwarp();
    Softmax over_all{};
    float top = 0.f, weight_sum = 0.f;
    float mine[4] = {};   // logit of the selected k = lane, lane + 32, ...
    int chosen[4] = {};
    for (int k = 0; k < p.K; k++) {
      const uint32_t key = __reduce_max_sync(~0u, best);
      const int id = __reduce_min_sync(~0u, best == key ? static_cast<unsigned>(best_id) : ~0u);
      const float value = x[id];
      if (k == 0) {
        top = value;
        if (all) over_all = softmax_of(x, p.E, lane, top);
      }
      weight_sum += __expf(value - top);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (k == lane + 32 * i) mine[i] = value, chosen[i] = id;
      if (id == best_id) {   // the lane that lost its best looks for the next; 0 is below every key
        keys[id] = 0;
        best = 0;
        best_id = p.E;
        for (int e = lane; e < p.E; e += 32)
          if (keys[e] > best) best = keys[e], best_id = e;
      }
    }
    if (p.kind == RouterKind::SoftmaxTopk) weight_sum = over_all.sum;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = lane + 32 * i;
      if (k >= p.K) continue;
      p.ids[t * p.K + k] = chosen[i];
      p.weights[t * p.K + k] = __expf(mine[i] - top) / weight_sum;
      atomicAdd(counts + chosen[i], 1);
    }
    if (p.aux)
      for (int e = lane; e < p.E; e += 32) sums[e] += over_all(x[e]);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.E; e += kThreads) {
    p.block_counts[int64_t{blockIdx.x} * p.E + e] = counts[e];
    if (!p.aux) continue;
    float sum = 0.f;
    for (int w = 0; w < kWarps; w++) sum += shared_floats[w * 3 * p.E + 2 * p.E + e];
    p.block_sums[int64_t{blockIdx.x} * p.E + e] = sum;
  }
}

// counts, and the load-balance loss E sum_e (counts_e / (T K)) mean_t p_te.
__global__ void __launch_bounds__(1024) topk_sums_kernel(const __grid_constant__ TopkParams p, int blocks) {
  __shared__ float loss[1024];
  float mine = 0.f;
  for (int e = threadIdx.x; e < p.E; e += 1024) {
    int count = 0;
    float sum = 0.f;
#pragma unroll 8
    for (int b = 0; b < blocks; b++) {
      count += p.block_counts[int64_t{b} * p.E + e];
      if (p.aux) sum += p.block_sums[int64_t{b} * p.E + e];
    }
    p.counts[e] = count;
    mine += static_cast<float>(count) * sum;
  }
  if (!p.aux) return;
  loss[threadIdx.x] = mine;
  for (int width = 512; width; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) loss[threadIdx.x] += loss[threadIdx.x + width];
  }
  const float T = static_cast<float>(p.T);
  if (threadIdx.x == 0) *p.aux = p.T ? loss[0] * static_cast<float>(p.E) / (T * static_cast<float>(p.K) * T) : 0.f;
}

struct TopkBackwardParams {
  int64_t T;
  int E, K;
  RouterKind kind;
  const int* ids;
  const float *weights, *dweights;
  const int* counts;
  const float* ds_parts;
  int64_t parts;
  const int* inverse;
  int64_t R_cap;
  const float* daux;
};

template <class Logit>
__global__ void __launch_bounds__(kThreads) topk_backward_kernel(const __grid_constant__ TopkBackwardParams p, const Logit* logits, Logit* dlogits) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *d = shared_floats + warp * 2 * p.E, *x = d + p.E;   // gradient and logits of the row
  const bool over_all = p.kind == RouterKind::SoftmaxTopk;
  const float scale = p.daux ? *p.daux * static_cast<float>(p.E) / (static_cast<float>(p.T) * static_cast<float>(p.K) * static_cast<float>(p.T)) : 0.f;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp; t < p.T; t += int64_t{gridDim.x} * kWarps) {
    float top = -INFINITY;
    for (int e = lane; e < p.E; e += 32) {
      d[e] = 0.f;
      if (!over_all && !p.daux) continue;
      x[e] = static_cast<float>(logits[t * p.E + e]);
      top = fmaxf(top, x[e]);
    }
    __syncwarp();
    float mean = 0.f;
    for (int k = lane; k < p.K; k += 32) {
      const int64_t slot = t * p.K + k;
      float dw;
      if (p.dweights) {
        dw = p.dweights[slot];
      } else {
        const int row = p.inverse[slot];
        dw = row < 0 ? 0.f : score_gradient(p.ds_parts, p.parts, p.R_cap, row);
      }
      d[p.ids[slot]] = dw;
      mean += p.weights[slot] * dw;
    }
    mean = warp_sum(mean);
    __syncwarp();
    if (!over_all)
      for (int k = lane; k < p.K; k += 32) {
        const int64_t slot = t * p.K + k;
        d[p.ids[slot]] = p.weights[slot] * (d[p.ids[slot]] - mean);
      }
    Softmax prob{};
    float load = 0.f;
    if (over_all || p.daux) {
#pragma unroll
      for (int delta = 16; delta; delta /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, delta));
      prob = softmax_of(x, p.E, lane, top);
      for (int e = lane; p.daux && e < p.E; e += 32) load += static_cast<float>(p.counts[e]) * prob(x[e]);
      load = warp_sum(load);
    }
    __syncwarp();
    for (int e = lane; e < p.E; e += 32) {
      float v = d[e];
      if (over_all) v = prob(x[e]) * (v - mean);
      if (p.daux) v += scale * prob(x[e]) * (static_cast<float>(p.counts[e]) - load);
      dlogits[t * p.E + e] = static_cast<Logit>(v);
    }
    __syncwarp();
  }
}

template <class F> void dispatch_logits(DType dtype, F&& f) {
  MACHMOE_SUPPORTED(dtype != DType::F64, "logits_dtype is F64, expected F32, BF16 or F16 on CUDA");
  if (dtype == DType::BF16) f(__nv_bfloat16{}); else if (dtype == DType::F16) f(__half{}); else f(float{});
}
void check_sizes(int64_t E, int64_t K) {
  MACHMOE_SUPPORTED(E <= kMaxExperts, "E is {}, expected at most {} experts on CUDA", E, kMaxExperts);
  MACHMOE_SUPPORTED(K <= 128, "K is {}, expected at most 128 on CUDA", K);
}
template <class Kernel> void allow_smem(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024) MACHMOE_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace

size_t topk_scratch(int64_t T, int64_t E, int64_t) {
  Workspace ws;
  ws.take<int>(blocks_of(T) * E);
  ws.take<float>(blocks_of(T) * E);
  return ws.used();
}

void topk(const TopkArgs& a, Stream stream) {
  check_sizes(a.E, a.K);
  const int64_t blocks = blocks_of(a.T);
  Workspace ws(a.scratch);
  TopkParams p{a.T, static_cast<int>(a.E), static_cast<int>(a.K), a.kind, a.ids, static_cast<float*>(a.weights), a.counts, static_cast<float*>(a.aux),
               ws.take<int>(blocks * a.E), ws.take<float>(blocks * a.E)};
  const size_t smem = sizeof(float) * static_cast<size_t>((3 * kWarps + 1) * a.E);
  dispatch_logits(a.logits_dtype, [&](auto logit) {
    using Logit = decltype(logit);
    allow_smem(topk_kernel<Logit>, smem);
    topk_kernel<<<static_cast<unsigned>(blocks), kThreads, smem, stream_of(stream)>>>(p, static_cast<const Logit*>(a.logits));
  });
  topk_sums_kernel<<<1, 1024, 0, stream_of(stream)>>>(p, static_cast<int>(blocks));
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

void topk_backward(const TopkBackwardArgs& a, Stream stream) {
  check_sizes(a.E, a.K);
  if (a.T == 0) return;
  const TopkBackwardParams p{a.T, static_cast<int>(a.E), static_cast<int>(a.K), a.kind, a.ids, static_cast<const float*>(a.weights),
                             static_cast<const float*>(a.dweights), a.counts, static_cast<const float*>(a.ds_parts), a.parts, a.inverse, a.R_cap,
                             static_cast<const float*>(a.daux)};
  const size_t smem = sizeof(float) * static_cast<size_t>(2 * kWarps * a.E);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((a.T + kWarps - 1) / kWarps, int64_t{16} * num_sms()));
  dispatch_logits(a.logits_dtype, [&](auto logit) {
    using Logit = decltype(logit);
    allow_smem(topk_backward_kernel<Logit>, smem);
    topk_backward_kernel<<<blocks, kThreads, smem, stream_of(stream)>>>(p, static_cast<const Logit*>(a.logits), static_cast<Logit*>(a.dlogits));
  });
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
