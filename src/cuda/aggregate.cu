// O and dX: every token gathers its rows and adds them in slot order. One block a token, 16 bytes a thread; dS rides along.
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/score_grad.cuh"
#include "cuda/vector.cuh"

namespace machmoe::cuda {
namespace {

struct AggregateParams {
  Routing routing;
  int64_t T, d, E, R_cap;
  int K;
  bool topk, weighted;
  const bf16 *y, *addend, *b2;
  int64_t b2_stride, b2_expert_stride;
  bf16* out;
  const float* ds_parts;
  int64_t parts;
  void* dscore;  // null: no score gradient
  DType dscore_dtype;
};

__device__ void store_score(const AggregateParams& p, int64_t i, float v) {
  if (p.dscore_dtype == DType::BF16) static_cast<__nv_bfloat16*>(p.dscore)[i] = __float2bfloat16(v);
  else if (p.dscore_dtype == DType::F16) static_cast<__half*>(p.dscore)[i] = __float2half(v);
  else static_cast<float*>(p.dscore)[i] = v;
}

// dS of this token's slots: TopK in slot order, Lists in row order; the rows past R are shared out among the tokens.
__device__ void write_scores(const AggregateParams& p, int64_t t, int begin, int end) {
  for (int slot = begin + static_cast<int>(threadIdx.x); slot < end; slot += blockDim.x) {
    const int row = p.routing.inverse[slot];
    if (p.topk) store_score(p, slot, row < 0 ? 0.f : score_gradient(p.ds_parts, p.parts, p.R_cap, row));
    else store_score(p, row, score_gradient(p.ds_parts, p.parts, p.R_cap, row));
  }
  if (p.topk) return;
  for (int64_t row = p.routing.token_offsets[p.T] + t * blockDim.x + threadIdx.x; row < p.R_cap; row += p.T * blockDim.x) store_score(p, row, 0.f);
}

__device__ int expert_of_row(const int* offsets, int64_t E, int row) {
  int64_t low = 0, high = E;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= row) low = middle;
    else high = middle;
  }
  return static_cast<int>(low);
}

template <bool kWeighted, bool kBias>
__global__ void __launch_bounds__(256) aggregate_kernel(const __grid_constant__ AggregateParams p) {
  constexpr int kUnroll = 4;  // rows in flight per thread
  const int64_t t = blockIdx.x;
  const int begin = p.topk ? static_cast<int>(t) * p.K : p.routing.token_offsets[t], end = p.topk ? begin + p.K : p.routing.token_offsets[t + 1];
  const auto* score = static_cast<const float*>(p.routing.score);
  for (int64_t column = threadIdx.x * 8; column < p.d; column += blockDim.x * 8) {
    float sum[8] = {};
    if (p.addend) Vec8::load(p.addend + t * p.d + column).to(sum);
    for (int slot = begin; slot < end; slot += kUnroll) {
      int row[kUnroll];
      Vec8 y[kUnroll];
      float s[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) row[i] = slot + i < end ? p.routing.inverse[slot + i] : -1;
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        if (row[i] < 0) continue;
        y[i] = Vec8::load(p.y + int64_t{row[i]} * p.d + column);
        s[i] = kWeighted ? score[row[i]] : 1.f;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        if (row[i] < 0) continue;
        float v[8];
        y[i].to(v);
        if constexpr (kBias) {
          const bf16* b2 = p.b2 + expert_of_row(p.routing.offsets, p.E, row[i]) * p.b2_expert_stride;
#pragma unroll
          for (int j = 0; j < 8; j++) v[j] += __bfloat162float(b2[(column + j) * p.b2_stride]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = kWeighted ? fmaf(s[i], v[j], sum[j]) : sum[j] + v[j];
      }
    }
    Vec8::from(sum).store(p.out + t * p.d + column);
  }
  if (p.dscore) write_scores(p, t, begin, end);
}

}  // namespace

void aggregate(const AggregateArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.T == 0) {
    if (a.score_grad.dscore) score_grad(a.score_grad, stream);
    return;
  }
  const AggregateParams p{a.routing,
                          s.T,
                          s.d,
                          s.E,
                          s.R_cap,
                          static_cast<int>(s.K),
                          s.kind == RoutingKind::TopK,
                          a.weighted,
                          static_cast<const bf16*>(a.y),
                          static_cast<const bf16*>(a.addend),
                          static_cast<const bf16*>(a.b2.base),
                          a.b2.stride,
                          a.b2.expert_stride,
                          static_cast<bf16*>(a.out),
                          static_cast<const float*>(a.score_grad.ds_parts),
                          a.score_grad.parts,
                          a.score_grad.dscore,
                          a.score_grad.dscore_dtype};
  const auto blocks = static_cast<unsigned>(s.T);
  const auto threads = static_cast<unsigned>(std::min<int64_t>(256, (s.d / 8 + 31) / 32 * 32));
  if (a.weighted && a.b2.base) aggregate_kernel<true, true><<<blocks, threads, 0, stream_of(stream)>>>(p);
  else if (a.weighted) aggregate_kernel<true, false><<<blocks, threads, 0, stream_of(stream)>>>(p);
  else aggregate_kernel<false, false><<<blocks, threads, 0, stream_of(stream)>>>(p);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
