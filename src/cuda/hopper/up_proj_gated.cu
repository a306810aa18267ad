// The A kernel of the gated activations, with limits and biases.
#include "cuda/hopper/gemm/up_proj.cuh"

namespace machmoe::cuda::hopper {

void up_proj_gated(const UpProjArgs& a, Stream stream) {
  switch (a.shape.act.kind) {
    case ActivationKind::SwiGLU: return up_proj_general<ActivationKind::SwiGLU>(a, stream);
    case ActivationKind::SwiGLUOai: return up_proj_general<ActivationKind::SwiGLUOai>(a, stream);
    case ActivationKind::GeGLU: return up_proj_general<ActivationKind::GeGLU>(a, stream);
    default: return up_proj_general<ActivationKind::ReGLU>(a, stream);
  }
}

}  // namespace machmoe::cuda::hopper
