// The order of the output tiles of a grouped GEMM, as items 0, 1, 2, ...
#pragma once
#include <algorithm>
#include <cstdint>

namespace machmoe::cuda::hopper {

// A pair of row tiles, 2 pair and 2 pair + 1, and a column tile; of weight gradients the expert's place in the work list, and its tile. pair < 0: past
// the end.
struct TilePlace {
  int pair, column;
};

// Weight gradients: the experts as the work list has them, the tiles of one in a row.
struct ExpertOrder {
  int tiles;  // of an expert

  constexpr int items(int experts) const { return experts * tiles; }
  // 0 <= item < items(experts)
  constexpr TilePlace place(int item, int /*experts*/) const { return {item / tiles, item % tiles}; }
};

// Products over ragged rows: groups of pairs of row tiles x column tiles, the pairs of a group innermost.
struct TileOrder {
  int pairs, columns;  // of a group: 1 or 2; column tiles
  uint32_t inverse;    // 2^32 / (items of a group), rounded down

  // Two pairs share weights in L2 and halve the clusters that read the same rows at once; gathered rows come from memory for all columns at once.
  // Soaked TFLOP/s with 1, 2, 4, 8 pairs, random routing, one H100, two runs (DeepSeek-V3 has 512 rows an expert, the other shape 256):
  //   DeepSeek-V3                   Y 593, 615, 624, 608   dX~ 591, 626, 629, 630   A 593, 603   dH 564, 561
  //   (16384, 1536, 1024, 128, 2)   Y 450, 445, 439, 429   dX~ 480, 478, 461, 454   A 439, 440   dH 311, 294
  // From 1,536 rows on no choice differs beyond the noise.
  static constexpr TileOrder make(bool gathered, int64_t columns) {
    const int pairs = gathered ? 1 : 2;
    return {pairs, static_cast<int>(columns), static_cast<uint32_t>(std::min<int64_t>((int64_t{1} << 32) / (pairs * columns), UINT32_MAX))};
  }

  constexpr int items(int tiles) const { return (tiles + 1) / 2 * columns; }
  // 0 <= item < items(tiles)
  constexpr TilePlace place(int item, int tiles) const {
    const int size = pairs * columns;
    int group = static_cast<int>(static_cast<uint64_t>(item) * inverse >> 32);  // one too low at times
    if (item - group * size >= size) group++;
    const int first = group * pairs, i = item - group * size;
    if (pairs == 1 || first + 1 == (tiles + 1) / 2) return {first, i};  // the last group may have one pair alone
    return {first + i % 2, i / 2};
  }
};

}  // namespace machmoe::cuda::hopper
