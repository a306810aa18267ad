// The A kernel of the gated activations, with limits and biases.
#include "cuda/hopper/gemm/up_proj.cuh"

namespace machmoe::cuda::hopper {

void up_proj_gated(const UpProjArgs& a, Stream stream) {
  switch (a.shape.act.kind) {
    case ActivationKind::SwiGLU: return launch_up_proj<ActivationKind::SwiGLU, true>(a, stream);
    case ActivationKind::SwiGLUOai: return launch_up_proj<ActivationKind::SwiGLUOai, true>(a, stream);
    case ActivationKind::GeGLU: return launch_up_proj<ActivationKind::GeGLU, true>(a, stream);
    default: return launch_up_proj<ActivationKind::ReGLU, true>(a, stream);
  }
}

}  // namespace machmoe::cuda::hopper
