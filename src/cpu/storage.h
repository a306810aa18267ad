// From a DType to its C++ storage type: dispatch_float(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... }).
#pragma once
#include <type_traits>

#include "core/check.h"
#include "core/float16.h"
#include "core/types.h"

namespace machmoe::cpu {

template <class Fn>
auto dispatch_float(DType dtype, Fn&& f) {
  switch (dtype) {
    case DType::F32: return f(std::type_identity<float>());
    case DType::BF16: return f(std::type_identity<BF16>());
    case DType::F16: return f(std::type_identity<F16>());
    case DType::F64: return f(std::type_identity<double>());
    default: throw Error(Status::Internal, "an element type that is no float reached the CPU backend");
  }
}

// Scores, dS and accumulation: double beside double, else float.
template <class T>
using AccumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace machmoe::cpu
