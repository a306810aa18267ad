// The A kernel of the plain activations: W1 has one plane.
#include "cuda/hopper/gemm/up_proj.cuh"

namespace machmoe::cuda::hopper {

void up_proj_plain(const UpProjArgs& a, Stream stream) {
  switch (a.shape.act.kind) {
    case ActivationKind::ReLU2: return up_proj_general<ActivationKind::ReLU2>(a, stream);
    case ActivationKind::ReLU: return up_proj_general<ActivationKind::ReLU>(a, stream);
    case ActivationKind::GELU: return up_proj_general<ActivationKind::GELU>(a, stream);
    case ActivationKind::GELUErf: return up_proj_general<ActivationKind::GELUErf>(a, stream);
    default: return up_proj_general<ActivationKind::SiLU>(a, stream);
  }
}

}  // namespace machmoe::cuda::hopper
