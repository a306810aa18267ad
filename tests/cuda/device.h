// Device memory, times and the verdict of the drivers: programs of the CUDA backend that are run by hand on a GPU.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "edge_memory.h"

namespace machmoe::test {

// Elements of device memory between two guards; all of it starts as NaN (0xFF). edge: no page is mapped before it, instead of the first guard.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, bool edge = false) : size_(size), before_(edge ? 0 : 1024) {
    if (edge) {
      memory_ = edge_memory(whole());
    } else {
      void* memory = nullptr;
      MACHMOE_CUDA_CALL(cudaMalloc(&memory, whole()));
      memory_ = {memory, cudaFree};
    }
    poison();
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { upload(values.data(), size_ * sizeof(T)); }
  Buffer(Buffer&&) noexcept = default;
  Buffer& operator=(Buffer&&) noexcept = default;

  template <class As = T>
  As* data() const {
    return reinterpret_cast<As*>(static_cast<uint8_t*>(memory_.get()) + before_);
  }
  size_t size() const { return size_; }
  T* guard_begin() const { return data() - before_ / sizeof(T); }        // of the guard before the elements
  T* guard_end() const { return data() + size_ + kBehind / sizeof(T); }  // of the guard behind them
  void poison() { MACHMOE_CUDA_CALL(cudaMemset(memory_.get(), 0xFF, whole())); }
  void upload(const void* from, size_t bytes) { MACHMOE_CUDA_CALL(cudaMemcpy(data(), from, bytes, cudaMemcpyHostToDevice)); }
  template <class As = T>
  std::vector<As> download() const {
    std::vector<As> host(size_ * sizeof(T) / sizeof(As));
    MACHMOE_CUDA_CALL(cudaMemcpy(host.data(), data(), host.size() * sizeof(As), cudaMemcpyDeviceToHost));
    return host;
  }
  bool guards_hold() const {
    std::vector<uint8_t> guards(before_ + kBehind);
    MACHMOE_CUDA_CALL(cudaMemcpy(guards.data(), guard_begin(), before_, cudaMemcpyDeviceToHost));
    MACHMOE_CUDA_CALL(cudaMemcpy(guards.data() + before_, data() + size_, kBehind, cudaMemcpyDeviceToHost));
    return std::all_of(guards.begin(), guards.end(), [](uint8_t byte) { return byte == 0xFF; });
  }

 private:
  static constexpr size_t kBehind = 128 * 1024;  // bytes: whole tiles of the products
  size_t whole() const { return before_ + size_ * sizeof(T) + kBehind; }
  size_t size_, before_;
  std::shared_ptr<void> memory_;
};
using DeviceMemory = Buffer<uint8_t>;
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

// Milliseconds of one run: after 40 ms of rest (burst), and the mean of 100 ms after 150 ms of the same work (soaked: the power limit acts).
struct Milliseconds {
  float burst, soaked;
};
inline Milliseconds milliseconds(const std::function<void()>& run) {
  cudaEvent_t begin, end;
  MACHMOE_CUDA_CALL(cudaEventCreate(&begin));
  MACHMOE_CUDA_CALL(cudaEventCreate(&end));
  const auto mean_of = [&](int times) {
    MACHMOE_CUDA_CALL(cudaEventRecord(begin));
    for (int i = 0; i < times; i++) run();
    MACHMOE_CUDA_CALL(cudaEventRecord(end));
    MACHMOE_CUDA_CALL(cudaEventSynchronize(end));
    float ms = 0;
    MACHMOE_CUDA_CALL(cudaEventElapsedTime(&ms, begin, end));
    return ms / static_cast<float>(times);
  };
  std::vector<float> bursts;
  for (int i = 0; i < 3; i++) {
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    usleep(40000);
    run();
    bursts.push_back(mean_of(2));
  }
  std::sort(bursts.begin(), bursts.end());
  const int times = std::max(3, static_cast<int>(100 / bursts[1]));
  mean_of(times + times / 2);
  return {bursts[1], mean_of(times)};
}

class Verdict {
 public:
  void operator()(bool good, const std::string& what) {
    checks_++;
    if (!good) fail(what);
  }
  void fail(const std::string& what) {
    if (failures_++ < 400) printf("  FAIL %s\n", what.c_str());
    fflush(stdout);
  }
  bool ok() const { return failures_ == 0; }
  int checks() const { return checks_; }
  bool summary(const char* name) const {
    printf("%s: %d checks, %d failed\n", name, checks_, failures_);
    fflush(stdout);
    return ok();
  }

 private:
  int checks_ = 0, failures_ = 0;
};

}  // namespace machmoe::test
