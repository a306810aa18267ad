// The A kernel of the plain activations: W1 has one plane.
#include "cuda/hopper/gemm/up_proj.cuh"

namespace machmoe::cuda::hopper {

void up_proj_plain(const UpProjArgs& a, Stream stream) {
  switch (a.shape.act.kind) {
    case ActivationKind::ReLU2: return launch_up_proj<ActivationKind::ReLU2, true>(a, stream);
    case ActivationKind::ReLU: return launch_up_proj<ActivationKind::ReLU, true>(a, stream);
    case ActivationKind::GELU: return launch_up_proj<ActivationKind::GELU, true>(a, stream);
    case ActivationKind::GELUErf: return launch_up_proj<ActivationKind::GELUErf, true>(a, stream);
    default: return launch_up_proj<ActivationKind::SiLU, true>(a, stream);
  }
}

}  // namespace machmoe::cuda::hopper
