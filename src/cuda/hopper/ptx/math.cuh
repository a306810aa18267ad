// Approximations of the special function unit, within 2 ulp; denormals are flushed (PTX ISA "Floating Point Instructions").
#pragma once
#include "device.cuh"

namespace machmoe::cuda::hopper {

DEV float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace machmoe::cuda::hopper
