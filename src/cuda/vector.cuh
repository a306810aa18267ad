// Eight bf16 in one 16-byte access.
#pragma once
#include <cuda_bf16.h>

namespace machmoe::cuda {

using bf16 = __nv_bfloat16;

struct alignas(16) Vec8 {
  __nv_bfloat162 pair[4];

  __device__ static Vec8 load(const bf16* p) {
    Vec8 v;
    *reinterpret_cast<int4*>(&v) = __ldg(reinterpret_cast<const int4*>(p));
    return v;
  }
  __device__ void store(bf16* p) const { *reinterpret_cast<int4*>(p) = *reinterpret_cast<const int4*>(this); }
  __device__ void to(float (&f)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 v = __bfloat1622float2(pair[i]);
      f[2 * i] = v.x;
      f[2 * i + 1] = v.y;
    }
  }
  __device__ static Vec8 from(const float (&f)[8]) {
    Vec8 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.pair[i] = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
    return v;
  }
};

}  // namespace machmoe::cuda
