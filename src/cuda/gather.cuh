// Where the rows of the experts come from, as kernels read it: in two steps, so that a load can be under way while other work is done.
#pragma once
#include "core/divisor.h"
#include "ops.h"

namespace machmoe::cuda {

struct Gather {
  const int* index = nullptr;  // RowSource::index
  Divisor divisor;

  explicit Gather(const RowSource& s) : index(s.index), divisor(static_cast<uint32_t>(s.divisor)) {}
  Gather() = default;
  __device__ int load(int row) const { return index ? __ldg(index + row) : row; }
  __device__ uint32_t token(int loaded) const { return divisor.quotient(static_cast<uint32_t>(loaded)); }
  __device__ uint32_t operator[](int row) const { return token(load(row)); }
};

}  // namespace machmoe::cuda
