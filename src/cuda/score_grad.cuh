// dS: of one row the column tiles' partial sums, added in order. Called by the score_grad op and the router's backward.
#pragma once
#include <cstdint>

namespace machmoe::cuda {

__device__ inline float score_gradient(const float* parts, int64_t count, int64_t R_cap, int64_t row) {
  float sum = 0.f;
  for (int64_t part = 0; part < count; part++) sum += parts[part * R_cap + row];
  return sum;
}

}  // namespace machmoe::cuda
