// Host side of every launch: the error check, the stream and the number of SMs of the current device.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "core/check.h"
#include "core/types.h"

#define MACHMOE_CUDA_CALL(call)                                                                                                 \
  do {                                                                                                                          \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess)                                                             \
      throw ::machmoe::Error(::machmoe::Status::Backend,                                                                        \
                             fmt::format("{} failed: {} ({})", #call, cudaGetErrorString(status_), cudaGetErrorName(status_))); \
  } while (0)

namespace machmoe::cuda {

inline cudaStream_t stream_of(Stream s) { return static_cast<cudaStream_t>(s.handle); }

// WhilePreviousDrains: CTAs are scheduled as those of the kernel before it leave (programmatic dependent launch); for kernels that follow another one
// of the same call. The kernel calls begin_after_previous() before it touches global memory.
enum class Start { AfterPrevious, WhilePreviousDrains };

template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t smem_bytes, Stream stream, Start start,
            std::type_identity_t<Params>... params) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = start == Start::WhilePreviousDrains;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream_of(stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  MACHMOE_CUDA_CALL(cudaLaunchKernelEx(&config, kernel, params...));
}

#ifdef __CUDACC__
// The next kernel may be scheduled as CTAs of this one leave; what the kernels before this one wrote is visible from here on.
__device__ __forceinline__ void begin_after_previous() {
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
}
#endif

int num_sms();  // of the current device, asked for once per device

}  // namespace machmoe::cuda
