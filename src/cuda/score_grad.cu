// dS on its own: dispatched rows, and backwards that want no dX.
#include "cuda/score_grad.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace machmoe::cuda {
namespace {

template <class Out>
__global__ void __launch_bounds__(256)
    score_grad_kernel(Routing r, const float* parts, int64_t count, int64_t R_cap, int64_t E, bool topk, Out* out) {
  const int64_t slot = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (slot >= R_cap) return;
  const int64_t row = topk ? r.inverse[slot] : slot < r.offsets[E] ? slot : -1;
  out[slot] = static_cast<Out>(row < 0 ? 0.f : score_gradient(parts, count, R_cap, row));
}

}  // namespace

void score_grad(const ScoreGradArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.R_cap == 0) return;
  const auto blocks = static_cast<unsigned>((s.R_cap + 255) / 256);
  const auto launch = [&](auto out) {
    using Out = decltype(out);
    score_grad_kernel<<<blocks, 256, 0, stream_of(stream)>>>(a.routing, static_cast<const float*>(a.ds_parts), a.parts, s.R_cap, s.E,
                                                             s.kind == RoutingKind::TopK, static_cast<Out*>(a.dscore));
  };
  if (a.dscore_dtype == DType::BF16) launch(__nv_bfloat16{});
  else if (a.dscore_dtype == DType::F16) launch(__half{});
  else launch(float{});
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda
