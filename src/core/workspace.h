// One function books the buffers of a pass: run over a null base it yields the size, over real memory the pointers.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace machmoe {

class Workspace {
 public:
  static constexpr size_t kAlign = 256;  // bytes; TMA needs 128, cudaMalloc gives 256

  explicit Workspace(void* base = nullptr) : base_(static_cast<uint8_t*>(base)) {}

  // Books `bytes` and returns their address (null while only sizes are asked for).
  void* take(size_t bytes) {
    size_t at = used_;
    used_ += (bytes + kAlign - 1) / kAlign * kAlign;
    return base_ ? base_ + at : nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take(sizeof(T) * static_cast<size_t>(count)));
  }
  size_t used() const { return used_; }
  // A copy of this one booked buffers that may lie under those booked here since.
  void cover(const Workspace& other) { used_ = std::max(used_, other.used_); }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace machmoe
