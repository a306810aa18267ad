// bf16 and fp16 as storage types of the host. Arithmetic happens in fp32; stores round to nearest even.
#pragma once
#include <bit>
#include <cstdint>

namespace machmoe {

struct BF16 {
  uint16_t bits;

  BF16() = default;
  explicit constexpr BF16(float x) : bits(round(std::bit_cast<uint32_t>(x))) {}
  explicit constexpr operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

 private:
  static constexpr uint16_t round(uint32_t u) {
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>((nan ? u | 0x00400000u : u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

struct F16 {
  uint16_t bits;

  F16() = default;
  explicit constexpr F16(float x) : bits(round(std::bit_cast<uint32_t>(x))) {}
  explicit constexpr operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The bits as an fp32 number are 2^-112 of the value, subnormals included.
    const float value = std::bit_cast<float>(magnitude << 13) * std::bit_cast<float>(uint32_t{(127 + 112) << 23});
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }

 private:
  static constexpr uint16_t round(uint32_t u) {
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                                               // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
  }
};

}  // namespace machmoe
