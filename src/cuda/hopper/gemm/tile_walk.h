// The order in which a cluster visits the output tiles of a grouped GEMM over ragged rows: pairs of row tiles x column tiles, the pairs of a group
// innermost. With several pairs in a group neighbours share weights and fewer clusters read the same rows at once.
// Item numbers advance by the clusters of the grid; they are kept as digits (group, column, pair), so that no loop divides. Columns are rotated by
// the group: else a stride divisible by the column tiles gives one cluster the same column for ever, and a narrower last tile unbalances the grid.
#pragma once
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

// Pairs of a group. Small experts, up to three pairs on average, go better with 8, unless their rows are gathered: these come from memory for all
// columns of a pair at once. Soaked TFLOP/s at DeepSeek-V3 (512 rows an expert) with 1, 2, 4, 8, 16 pairs, one H100:
//   Y 526, 565, 582, 597, 544   dX~ 508, 523, 603, 624, 580   gathered, 1 and 8: A 539, 488   dH 559, 472
// At 640 rows (Qwen3-Next) 8 pairs change nothing, from 1,536 rows on Y - 3 to + 3 %.
constexpr int group_pairs(bool gathered, int64_t R_cap, int64_t E) { return !gathered && R_cap / E < 768 ? 8 : 1; }

struct WalkStep {
  const int* tiles;  // valid row tiles, on the device
  const WorkTile* work;
  int pairs, columns;                 // of a group; column tiles
  int group, column, pair, rotation;  // one step of all clusters, as digits

  // clusters: those of the grid.
  static constexpr WalkStep make(const int* tiles, const WorkTile* work, int pairs, int64_t columns, int clusters) {
    const int c = static_cast<int>(columns), group = clusters / (c * pairs);
    return {tiles, work, pairs, c, group, clusters / pairs % c, clusters % pairs, group % c};
  }
};

struct TileWalk {
  int group, column, pair, rotation;

  constexpr TileWalk(const WalkStep& s, int first)
      : group(first / s.pairs / s.columns), column(first / s.pairs % s.columns), pair(first % s.pairs), rotation(group % s.columns) {}
  constexpr int entry(const WalkStep& s) const { return group * s.pairs + pair; }
  constexpr bool ended(const WalkStep& s, int tiles) const { return 2 * group * s.pairs >= tiles; }
  constexpr void advance(const WalkStep& s) {
    pair += s.pair;
    column += s.column;
    group += s.group;
    rotation += s.rotation;
    if (pair >= s.pairs) {
      pair -= s.pairs;
      column++;
    }
    if (column >= s.columns) {
      column -= s.columns;
      group++;
      rotation++;
    }
    if (rotation >= s.columns) rotation -= s.columns;
  }
  // On to the next item that exists, the present one included: the last group may be short.
  constexpr void settle(const WalkStep& s, int tiles) {
    while (!ended(s, tiles) && 2 * entry(s) >= tiles) advance(s);
  }
  constexpr int rotated(const WalkStep& s) const {
    const int c = column + rotation;
    return c >= s.columns ? c - s.columns : c;
  }
};

}  // namespace machmoe::cuda::hopper
