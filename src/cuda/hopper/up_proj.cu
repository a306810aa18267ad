// A kernel: H = gather(X) W1^T + b1, A = act(H). Plain SwiGLU stands here, the other activations, limits and biases in up_proj_gated.cu and up_proj_plain.cu.
#include "cuda/hopper/gemm/up_proj.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {

void up_proj(const UpProjArgs& a, Stream stream) {
  if (a.shape.R_cap == 0 || (!a.h && !a.a)) return;
  check_aligned(a.x, "x");
  const Activation& act = a.shape.act;
  if (!act.gated()) return up_proj_plain(a, stream);
  if (act.kind != ActivationKind::SwiGLU || act.limit > 0 || a.b1_gate.base || a.b1_up.base) return up_proj_gated(a, stream);
  launch_up_proj<ActivationKind::SwiGLU, false>(a, stream);
}

}  // namespace machmoe::cuda::hopper
