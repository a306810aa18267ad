// Device memory and times for the drivers: programs of the CUDA backend that are run by hand on a GPU.
#pragma once
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "cuda/launch.h"

namespace machmoe::test {

// Device memory between two guards; all of it starts as NaN (0xFF).
class DeviceMemory {
 public:
  static constexpr size_t kGuard = 1024;
  explicit DeviceMemory(size_t bytes = 0) : bytes_(bytes) {
    MACHMOE_CUDA_CALL(cudaMalloc(&base_, bytes + 2 * kGuard));
    MACHMOE_CUDA_CALL(cudaMemset(base_, 0xFF, bytes + 2 * kGuard));
  }
  DeviceMemory(DeviceMemory&& other) noexcept : base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(base_); }
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(base_ + kGuard);
  }
  size_t size() const { return bytes_; }
  void upload(const void* from, size_t bytes) { MACHMOE_CUDA_CALL(cudaMemcpy(data(), from, bytes, cudaMemcpyHostToDevice)); }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    MACHMOE_CUDA_CALL(cudaMemcpy(host.data(), data(), host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  bool guards_hold() const {
    std::vector<uint8_t> guards(2 * kGuard);
    MACHMOE_CUDA_CALL(cudaMemcpy(guards.data(), base_, kGuard, cudaMemcpyDeviceToHost));
    MACHMOE_CUDA_CALL(cudaMemcpy(guards.data() + kGuard, base_ + kGuard + bytes_, kGuard, cudaMemcpyDeviceToHost));
    return std::all_of(guards.begin(), guards.end(), [](uint8_t byte) { return byte == 0xFF; });
  }

 private:
  uint8_t* base_ = nullptr;
  size_t bytes_ = 0;
};
template <class T>
DeviceMemory on_device(const std::vector<T>& host) {
  DeviceMemory memory(host.size() * sizeof(T));
  memory.upload(host.data(), host.size() * sizeof(T));
  return memory;
}

// Microseconds of one run: the median of 5 replays of a graph of `times` runs. Capturing proves that nothing synchronises.
inline double microseconds(const std::function<void(Stream)>& run, int times = 20) {
  cudaStream_t stream;
  MACHMOE_CUDA_CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  run({stream});
  MACHMOE_CUDA_CALL(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  MACHMOE_CUDA_CALL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < times; i++) run({stream});
  MACHMOE_CUDA_CALL(cudaStreamEndCapture(stream, &graph));
  MACHMOE_CUDA_CALL(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  MACHMOE_CUDA_CALL(cudaEventCreate(&begin));
  MACHMOE_CUDA_CALL(cudaEventCreate(&end));
  std::vector<float> ms;
  for (int i = 0; i < 6; i++) {
    MACHMOE_CUDA_CALL(cudaEventRecord(begin, stream));
    MACHMOE_CUDA_CALL(cudaGraphLaunch(exec, stream));
    MACHMOE_CUDA_CALL(cudaEventRecord(end, stream));
    MACHMOE_CUDA_CALL(cudaEventSynchronize(end));
    float time = 0;
    MACHMOE_CUDA_CALL(cudaEventElapsedTime(&time, begin, end));
    if (i > 0) ms.push_back(time);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::nth_element(ms.begin(), ms.begin() + 2, ms.end());
  return 1e3 * ms[2] / times;
}

class Verdict {
 public:
  void operator()(bool good, const std::string& what) {
    checks_++;
    if (good) return;
    if (failures_++ < 40) printf("  FAIL %s\n", what.c_str());
  }
  bool summary(const char* name) const {
    printf("%s: %d checks, %d failed\n", name, checks_, failures_);
    fflush(stdout);
    return failures_ == 0;
  }

 private:
  int checks_ = 0, failures_ = 0;
};

}  // namespace machmoe::test
