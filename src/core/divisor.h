// Division by a number known on the host: a product and a shift, for kernels that divide in their inner loops.
#pragma once
#include <cstdint>

namespace machmoe {

// n / d = (n multiplier) >> (31 + shift) for 0 <= n < 2^31, with multiplier = ceil(2^(31 + shift) / d), shift = ceil(log2 d): the multiplier is less
// than d / 2^(31 + shift) of itself too large, which adds less than n / 2^31 / d to the quotient (Granlund and Montgomery 1994).
struct Divisor {
  uint32_t multiplier = 1u << 31, shift = 0;

  constexpr Divisor() = default;
  explicit constexpr Divisor(uint32_t d) {  // 1 .. 2^31
    while (uint64_t{1} << shift < d) shift++;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
  constexpr uint32_t quotient(uint32_t n) const { return static_cast<uint32_t>(uint64_t{2 * n} * multiplier >> 32) >> shift; }
};

}  // namespace machmoe
