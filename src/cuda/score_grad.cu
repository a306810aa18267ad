// dS on its own: dispatched rows, and backwards that want no dX.
#include "cuda/score_grad.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace machmoe::cuda {
namespace {

__global__ void __launch_bounds__(256) score_grad_kernel(const __grid_constant__ ScoreGradParams p) {
  p.write(int64_t{blockIdx.x} * 256 + threadIdx.x, int64_t{gridDim.x} * 256);
}

}  // namespace

void score_grad(const ScoreGradArgs& a, Stream stream) {
  if (a.shape.R_cap == 0) return;
  score_grad_kernel<<<static_cast<unsigned>((a.shape.R_cap + 255) / 256), 256, 0, stream_of(stream)>>>(ScoreGradParams(a));
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
