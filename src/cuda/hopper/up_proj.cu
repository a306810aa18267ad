// A kernel: H = gather(X) W1^T + b1, A = act(H). Plain SwiGLU stands here, the other activations, limits and biases in up_proj_gated.cu and up_proj_plain.cu.
#include "cuda/hopper/gemm/up_proj.cuh"
#include "cuda/hopper/select.h"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {

template <int kColumns, int kBox, int kBuffers>
using SwiGLU = ActivationEpilogue<kColumns, kBox, kBuffers, ActivationKind::SwiGLU, false>;

void up_proj(const UpProjArgs& a, Stream stream) {
  if (a.shape.R_cap == 0 || (!a.h && !a.a)) return;
  switch (up_proj_kernel(a.shape, a.b1_gate.base || a.b1_up.base)) {
    case UpProjKernel::Cooperative256: return launch_up_proj<Cooperative<256, 4>, SwiGLU<256, 64, 2>>(a, stream);
    case UpProjKernel::PingPong192: return launch_up_proj<PingPong<192, 4>, SwiGLU<192, 32, 8>>(a, stream);
    case UpProjKernel::General256: return a.shape.act.gated() ? up_proj_gated(a, stream) : up_proj_plain(a, stream);
  }
}

}  // namespace machmoe::cuda::hopper
