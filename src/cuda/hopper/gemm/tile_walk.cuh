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

// Rows row .. row_end - 1 of an expert and a column tile. expert < 0: past the end of the list.
struct OutputTile {
  int expert, row, row_end, column;
  DEV bool valid() const { return expert >= 0; }
};
DEV OutputTile tile_at(const TileWalk& at, const WalkStep& s, int entries) {
  if (at.entry >= entries) return {-1, 0, 0, 0};
  const int4 t = __ldg(reinterpret_cast<const int4*>(s.work) + at.entry);
  return {t.x, t.y, t.z, at.rotated(s)};
}

// Tiles 2 i and 2 i + 1 of the work list for the two CTAs of a cluster, an entry of the walk being such a pair. Mostly both belong to one expert and
// share its weights; where an expert ends in between each CTA loads its own, so that none computes rows that do not exist.
// Loaded one tile ahead: construction touches no loaded value, else the producer would wait for it there and the ring run dry.
struct PairedTile {
  int4 work{};    // expert, row, row_end
  int other = 0;  // expert of the other CTA
  int column = 0;
  bool ended = true;    // past the end of the list
  bool absent = false;  // the list ended between the CTAs: no rows for this one, it only carries its share of the weights

  PairedTile() = default;
  DEV PairedTile(const TileWalk& at, const WalkStep& s, int tiles, int rank) {
    const int index = 2 * at.entry + rank, last = tiles - 1;
    ended = 2 * at.entry > last;
    if (ended) return;
    absent = index > last;
    work = __ldg(reinterpret_cast<const int4*>(s.work) + min(index, last));
    other = __ldg(&s.work[min(index ^ 1, last)].expert);
    column = at.rotated(s);
  }
  DEV int expert() const { return work.x; }
  DEV int row() const { return work.y; }
  DEV int row_end() const { return work.z; }
  DEV bool shared() const { return work.x == other; }
};

}  // namespace machmoe::cuda::hopper
