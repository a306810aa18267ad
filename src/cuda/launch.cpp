#include "cuda/launch.h"

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace machmoe::cuda {

int num_sms() {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  MACHMOE_CUDA_CALL(cudaGetDevice(&device));
  std::atomic<int>& sms = known[static_cast<size_t>(device) % known.size()];
  if (const int count = sms.load(std::memory_order_relaxed)) return count;
  int count = 0;
  MACHMOE_CUDA_CALL(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  sms.store(count, std::memory_order_relaxed);
  return count;
}

void allow_shared_memory(const void* kernel, size_t bytes) {
  static auto& mutex = *new std::mutex;  // never destroyed: autograd's threads may still launch when the process ends
  static auto& allowed = *new std::map<std::pair<const void*, int>, size_t>;  // of a kernel on a device
  int device = 0;
  MACHMOE_CUDA_CALL(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  size_t& known = allowed[{kernel, device}];
  if (bytes <= known) return;
  MACHMOE_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  known = bytes;
}

}  // namespace machmoe::cuda
