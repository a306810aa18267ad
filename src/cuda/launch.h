// Host side of every launch: the error check, the stream and the number of SMs of the current device.
#pragma once
#include <cuda_runtime.h>

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

int num_sms();  // of the current device, asked for once per device

// Lets a kernel have that much dynamic shared memory on the current device: told to the runtime once per kernel and device.
void allow_shared_memory(const void* kernel, int bytes);

}  // namespace machmoe::cuda
