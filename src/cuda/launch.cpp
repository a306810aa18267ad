#include "cuda/launch.h"

#include <array>
#include <atomic>

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

}  // namespace machmoe::cuda
