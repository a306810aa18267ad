// The order in which a cluster visits the output tiles of a grouped GEMM over ragged rows: pairs of row tiles x column tiles, the pairs of a group
// innermost. With several pairs in a group neighbours share weights and fewer clusters read the same rows at once.
// Item numbers advance by the clusters of the grid; they are kept as digits (group, column, pair), so that no loop divides. Columns are rotated by
// the group: else a stride divisible by the column tiles gives one cluster the same column for ever, and a narrower last tile unbalances the grid.
#pragma once
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

struct WalkStep {
  const int* tiles;  // valid row tiles, on the device
  const WorkTile* work;
  int pairs, columns;                 // of a group; column tiles
  int group, column, pair, rotation;  // one step of all clusters, as digits

  // clusters = those of the grid, at most one per item of the largest routing.
  static WalkStep make(const int* tiles, const WorkTile* work, int pairs, int64_t columns, int clusters) {
    const int c = static_cast<int>(columns), group = clusters / (c * pairs);
    return {tiles, work, pairs, c, group, clusters / pairs % c, clusters % pairs, group % c};
  }
};

struct TileWalk {
  int group, column, pair, rotation;

  DEV TileWalk(const WalkStep& s, int first)
      : group(first / s.pairs / s.columns), column(first / s.pairs % s.columns), pair(first % s.pairs), rotation(group % s.columns) {}
  DEV int entry(const WalkStep& s) const { return group * s.pairs + pair; }
  DEV bool ended(const WalkStep& s, int tiles) const { return 2 * group * s.pairs >= tiles; }
  DEV void advance(const WalkStep& s) {
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
  DEV void settle(const WalkStep& s, int tiles) {
    while (!ended(s, tiles) && 2 * entry(s) >= tiles) advance(s);
  }
  DEV int rotated(const WalkStep& s) const {
    const int c = column + rotation;
    return c >= s.columns ? c - s.columns : c;
  }
};

}  // namespace machmoe::cuda::hopper
