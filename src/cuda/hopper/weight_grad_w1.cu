// dW1_e = dH^T gather(X) : [n, d] for gate and up each. The same product as dW2 with X in place of dO; it leaves transposed.
#include "cuda/hopper/gemm/varlen_k.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {

void weight_grad_w1(const WeightGradW1Args& a, Stream stream) {
  const bool gated = a.shape.act.gated();
  const VarlenKProblem problem{a.shape, a.routing, a.x, a.dh, a.shape.planes(), {gated ? a.dw1_gate : a.dw1_up, a.dw1_up}, a.accumulate, a.turns};
  if (a.out_dtype == DType::F32) varlen_k<float, true>(problem, stream);
  else varlen_k<bf16, true>(problem, stream);
}

}  // namespace machmoe::cuda::hopper
