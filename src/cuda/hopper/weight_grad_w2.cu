// dW2_e = gather(dO)^T A' : [d, n], the accumulators leave as they are.
#include "cuda/hopper/gemm/varlen_k.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {

void weight_grad_w2(const WeightGradW2Args& a, Stream stream) {
  const VarlenKProblem problem{a.shape, a.routing, a.d_o, a.a_prime, 1, {a.dw2}, a.accumulate, a.turns};
  if (a.out_dtype == DType::F32) varlen_k<float, false>(problem, stream);
  else varlen_k<bf16, false>(problem, stream);
}

}  // namespace machmoe::cuda::hopper
