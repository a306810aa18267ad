// The choice of a backend, and what stands for the CUDA backend in a build without it.
#include "backend.h"

#include "core/check.h"

namespace machmoe {

const Backend& backend_for(Device device) {
  if (device == Device::CPU) return cpu_backend();
  MACHMOE_CHECK(device == Device::CUDA, "device is {}, expected CPU (0) or CUDA (1)", static_cast<int>(device));
  const Backend* backend = cuda_backend();
  MACHMOE_SUPPORTED(backend, "device is CUDA, expected a device that this build can use: {}", cuda_unavailable_reason());
  return *backend;
}

#ifndef MACHMOE_HAS_CUDA
const Backend* cuda_backend() { return nullptr; }
const char* cuda_unavailable_reason() { return "machmoe was built without CUDA; build it with nvcc of CUDA 12.5 or later, or use CPU tensors"; }
#endif

}  // namespace machmoe
