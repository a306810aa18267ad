// What every wrapper needs: the function qualifier, the element type and shared-memory addresses.
// Shared-memory addresses are 32 bits wide (the .shared::cta window) in this whole folder.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#define DEV __device__ __forceinline__

namespace machmoe::cuda::hopper {

using bf16 = __nv_bfloat16;

DEV uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

}  // namespace machmoe::cuda::hopper
