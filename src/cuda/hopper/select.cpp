#include "cuda/hopper/select.h"

namespace machmoe::cuda::hopper {

// Ping-pong hides its epilogue, but moves more bytes per product: it wins where its tiles fill n exactly.
UpProjKernel up_proj_kernel(const Shape& s, bool bias) {
  if (s.act.kind != ActivationKind::SwiGLU || s.act.limit > 0 || bias) return UpProjKernel::General256;
  return s.n % 96 == 0 ? UpProjKernel::PingPong192 : UpProjKernel::Cooperative256;
}

bool short_mainloop(const Shape& s) { return s.d < 2048; }

}  // namespace machmoe::cuda::hopper
