// The gradient of token rounding's scores (arXiv 2512.14080, section 5): a warp per token clears its row of E, then puts in the kept pairs.
#include <cfloat>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/router.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = kThreads / 32;  // of a block

__global__ void __launch_bounds__(kThreads) token_round_backward_kernel(const __grid_constant__ TokenRoundBackwardArgs p) {
  cudaGridDependencySynchronize();
  const int64_t t = int64_t{blockIdx.x} * kTokens + threadIdx.x / 32;
  if (t >= p.shape.T) return;
  const int lane = threadIdx.x % 32, E = static_cast<int>(p.shape.E);
  const int begin = p.routing.token_offsets[t], end = p.routing.token_offsets[t + 1];
  float* dp = p.dscores + t * E;
#pragma unroll 4
  for (int e = lane; e < E; e += 32) dp[e] = 0.f;  // while the offsets are on their way

  const auto each_pair = [&](auto f) {  // f(row, expert, ds) for every 32nd slot
#pragma unroll 1
    for (int slot = begin + lane; slot < end; slot += 32) {
      const int row = p.routing.inverse[slot];
      f(row, p.routing.expert[row], p.dscore[row]);
    }
  };
  float sum = 0.f, mean = 0.f;  // of p; of ds, weighted by s
  if (p.renormalize) {
    const float* scores = p.scores + t * E;
    const auto* score = static_cast<const float*>(p.routing.score);
    each_pair([&](int row, int e, float ds) {
      sum += scores[e];
      mean += score[row] * ds;
    });
    sum = warp_sum(sum);
    mean = warp_sum(mean);
  }
  const float scale = sum > 0.f ? fminf(1.f / sum, FLT_MAX) : 1.f;  // finite, for ds - mean = 0 of a token's only pair
  __syncwarp();                                                     // the row is clear
  each_pair([&](int, int e, float ds) { dp[e] = (ds - mean) * scale; });
}

}  // namespace

void token_round_backward(const TokenRoundBackwardArgs& a, Stream stream) {
  if (a.shape.T == 0) return;
  const auto blocks = static_cast<unsigned>((a.shape.T + kTokens - 1) / kTokens);
  launch_kernel(token_round_backward_kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace machmoe::cuda
