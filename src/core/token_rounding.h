// Token rounding (arXiv 2512.14080, §5, Algorithm 4): which multiple of the tile an expert's row count is rounded to.
// Shared by the CPU and the GPU, so that equal scores give equal routings.
#pragma once
#include <algorithm>
#include <cstdint>

#include "activation.h"

namespace machmoe {

// f = rows of an expert under top-K, down and up = the multiples of the tile around it.
enum class RoundingRule : int32_t {
  NrF = 0,  // nearest: up iff up - f < f - down
  SrF = 1,  // stochastic: up with probability (f - down) / tile
  NrS = 2,  // by scores: up with probability (sum of the scores of ranks down..f) / (sum of ranks down..up)
  Up = 3,
  Down = 4,
  BalanceF = 5,  // running residual over the experts: the total stays within half a tile of T K
};

// R_cap of a rounded routing; a pure host function of the shape.
constexpr int64_t rounded_capacity(int64_t T, int64_t E, int64_t K, int64_t tile, RoundingRule rule) {
  int64_t extra = 0;
  switch (rule) {
    case RoundingRule::Down: break;
    case RoundingRule::BalanceF: extra = tile / 2; break;
    case RoundingRule::NrF: extra = E * (tile / 2); break;
    case RoundingRule::Up:
    case RoundingRule::SrF:
    case RoundingRule::NrS: extra = E * (tile - 1); break;
  }
  return T < tile ? T * K : std::min(T * K + extra, T * E);  // fewer tokens than one tile: plain top-K
}

// Philox4x32-10 (Salmon et al., SC'11), counter = {expert, 0, 0, 0}, key = seed: 24 uniform bits in [0, 1).
MACHMOE_HD float philox_uniform(uint64_t seed, uint32_t expert) {
  uint32_t c0 = expert, c1 = 0, c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = static_cast<uint32_t>(p1);
    c2 = n2;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<float>(c0 >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

// Up or down, for the rules that look at one expert alone. below = sum of the scores of ranks down .. f - 1, span = of ranks
// down .. up - 1 (NrS only). The caller rounds down where up exceeds the number of tokens.
MACHMOE_HD bool rounds_up(RoundingRule rule, int32_t f, int32_t tile, uint64_t seed, uint32_t expert, float below, float span) {
  const int32_t over = f % tile;  // f - down
  if (over == 0) return false;
  switch (rule) {
    case RoundingRule::NrF: return tile - over < over;
    case RoundingRule::SrF: return philox_uniform(seed, expert) * static_cast<float>(tile) < static_cast<float>(over);
    case RoundingRule::NrS: return philox_uniform(seed, expert) * span < below;
    case RoundingRule::Up: return true;
    case RoundingRule::Down:
    case RoundingRule::BalanceF: break;
  }
  return false;
}

// Balance-f walks the experts in order with z = rounded so far - f so far.
MACHMOE_HD bool balance_rounds_up(int32_t f, int32_t tile, int64_t z) {
  const int32_t over = f % tile;
  if (over == 0) return false;
  const int64_t up = tile - over + z, down = z - over;
  return (up < 0 ? -up : up) < (down < 0 ? -down : down);
}

}  // namespace machmoe
