// Host side of every launch: the error check, the stream, the number of SMs of the current device and the launch itself.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
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

// Kernels read and write tokens 16 bytes at a time.
inline void check_aligned(const void* data, const char* name) {
  MACHMOE_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "{} is at {}, expected a multiple of 16 on CUDA: copy it into memory of its own", name,
                data);
}

int num_sms();  // of the current device, asked for once per device

// Lets a kernel have that much dynamic shared memory on the current device: told to the runtime once per kernel and device.
void allow_shared_memory(const void* kernel, size_t bytes);

// The kernel starts while the last one of the stream ends, a microsecond earlier than one that waits in the queue (CUDA C++ Programming Guide,
// "Programmatic Dependent Launch"). So all threads of every kernel call cudaGridDependencySynchronize() before they touch global memory: what earlier
// kernels wrote is there then, and what they read may be overwritten. No kernel lets the next one start before its own blocks are done. Cooperative
// launches wait in the queue.
template <class... Params>
void launch_kernel(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t smem, Stream stream,
                   const std::type_identity_t<Params>&... params) {
  constexpr size_t kUsualShared = 16 * 1024;  // beside at most 32 KB of static shared memory
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (smem > kUsualShared) allow_shared_memory(function, smem);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = smem;
  config.stream = stream_of(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  void* pointers[] = {const_cast<std::remove_const_t<Params>*>(&params)...};
  MACHMOE_CUDA_CALL(cudaLaunchKernelExC(&config, function, pointers));
}

}  // namespace machmoe::cuda
