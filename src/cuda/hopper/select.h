// Which kernel runs a shape: pure functions, on the host.
#pragma once
#include "core/types.h"

namespace machmoe::cuda::hopper {

enum class UpProjKernel {
  Cooperative256,  // SwiGLU, tiles of 128 columns of gate and up, shared by both warpgroups
  PingPong192,     // SwiGLU, tiles of 96 columns of gate and up, one per warpgroup
  General256,      // as Cooperative256, for every activation, with limits and biases
};
UpProjKernel up_proj_kernel(const Shape&, bool bias);
bool short_mainloop(const Shape&);  // of the dH kernel: more epilogue buffers, one stage less (plain SwiGLU)

}  // namespace machmoe::cuda::hopper
