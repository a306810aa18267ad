// The order in which a cluster visits the output tiles of a grouped GEMM over ragged rows: work-list entries x column tiles, columns innermost.
// Item numbers advance by the clusters of the grid; they are kept as digits (entry, column), so that no loop divides. Columns are rotated by
// the entry: else a stride divisible by the column tiles gives one cluster the same column for ever, and a narrower last tile unbalances the grid.
#pragma once
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

struct WalkStep {
  const int* entries;  // valid work-list entries, on the device
  const WorkTile* work;
  int columns;                  // column tiles
  int entry, column, rotation;  // one step of all clusters, as digits

  // clusters = those of the grid, at most one per item of the largest routing.
  static WalkStep make(const int* entries, const WorkTile* work, int64_t columns, int clusters) {
    const int c = static_cast<int>(columns);
    return {entries, work, c, clusters / c, clusters % c, clusters / c % c};
  }
};

struct TileWalk {
  int entry, column, rotation;

  DEV TileWalk(const WalkStep& s, int first) : entry(first / s.columns), column(first % s.columns), rotation(entry % s.columns) {}
  DEV void advance(const WalkStep& s) {
    column += s.column;
    entry += s.entry;
    rotation += s.rotation;
    if (column >= s.columns) {
      column -= s.columns;
      entry++;
      rotation++;
    }
    if (rotation >= s.columns) rotation -= s.columns;
  }
  DEV int rotated(const WalkStep& s) const {
    const int c = column + rotation;
    return c >= s.columns ? c - s.columns : c;
  }
};

}  // namespace machmoe::cuda::hopper
