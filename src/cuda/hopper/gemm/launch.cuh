// The launch of a GEMM kernel: 384 threads (one producer and two consumer warpgroups), one CTA an SM; clusters are an attribute of the kernel.
#pragma once
#include "cuda/launch.h"

namespace machmoe::cuda::hopper {

constexpr int kGemmThreads = 384;

template <class Params>
void launch_kernel(void (*kernel)(Params), int grid, int smem_bytes, Stream stream, const Params& p) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), smem_bytes);
  kernel<<<grid, kGemmThreads, smem_bytes, stream_of(stream)>>>(p);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace machmoe::cuda::hopper
