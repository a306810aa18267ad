// dS: TopK in slot order, else in row order; of rows that do not exist 0. One thread a gradient.
#include "cuda/score_grad.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace machmoe::cuda {
namespace {

struct Params {
  const int *inverse, *rows;  // TopK: slot -> row, -1 if dropped; else null, and R
  const float* parts;         // [count][R_cap]
  int64_t count, R_cap;
  void* dscore;  // [R_cap]
  DType dtype;
};

__global__ void __launch_bounds__(256) score_grad_kernel(const __grid_constant__ Params p) {
  cudaGridDependencySynchronize();
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= p.R_cap) return;
  const int64_t row = p.inverse ? p.inverse[i] : i < *p.rows ? i : -1;
  const float v = row < 0 ? 0.f : score_gradient(p.parts, p.count, p.R_cap, row);
  if (p.dtype == DType::BF16) static_cast<__nv_bfloat16*>(p.dscore)[i] = __float2bfloat16(v);
  else if (p.dtype == DType::F16) static_cast<__half*>(p.dscore)[i] = __float2half(v);
  else static_cast<float*>(p.dscore)[i] = v;
}

}  // namespace

void score_grad(const ScoreGradArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.R_cap == 0) return;
  const Params p{s.kind == RoutingKind::TopK ? a.routing.inverse : nullptr,
                 a.routing.offsets + s.E,
                 static_cast<const float*>(a.ds_parts),
                 a.parts,
                 s.R_cap,
                 a.dscore,
                 a.dscore_dtype};
  launch_kernel(score_grad_kernel, static_cast<unsigned>((s.R_cap + 255) / 256), 256, 0, stream, p);
}

}  // namespace machmoe::cuda
