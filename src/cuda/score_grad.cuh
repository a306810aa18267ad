// dS: of one row the column tiles' partial sums, added in order. Called by the aggregation, the score_grad op and the router's backward.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops.h"

namespace machmoe::cuda {

__device__ inline float score_gradient(const float* parts, int64_t count, int64_t R_cap, int64_t row) {
  float sum = 0.f;
  for (int64_t part = 0; part < count; part++) sum += parts[part * R_cap + row];
  return sum;
}

struct ScoreGradParams {
  const int *inverse, *rows;  // TopK: slot -> row, -1 if dropped; else null, and R
  const float* parts;         // [count][R_cap]
  int64_t count, R_cap;
  void* dscore;  // [R_cap], null: none
  DType dtype;

  explicit ScoreGradParams(const ScoreGradArgs& a)
      : inverse(a.shape.kind == RoutingKind::TopK ? a.routing.inverse : nullptr),
        rows(a.routing.offsets + a.shape.E),
        parts(static_cast<const float*>(a.ds_parts)),
        count(a.parts),
        R_cap(a.shape.R_cap),
        dscore(a.dscore),
        dtype(a.dscore_dtype) {}
  // Every `threads`-th gradient from `thread` on: TopK in slot order, else in row order; of rows that do not exist 0.
  __device__ void write(int64_t thread, int64_t threads) const {
    for (int64_t i = thread; i < R_cap; i += threads) {
      const int64_t row = inverse ? inverse[i] : i < *rows ? i : -1;
      const float v = row < 0 ? 0.f : score_gradient(parts, count, R_cap, row);
      if (dtype == DType::BF16) static_cast<__nv_bfloat16*>(dscore)[i] = __float2bfloat16(v);
      else if (dtype == DType::F16) static_cast<__half*>(dscore)[i] = __float2half(v);
      else static_cast<float*>(dscore)[i] = v;
    }
  }
};

}  // namespace machmoe::cuda
