// The work of a cluster of two CTAs: tiles 2 i and 2 i + 1 of the work list (128 rows each, in order of expert and row), times one column tile.
// Mostly both belong to one expert and share its weights; where an expert ends in between, each CTA loads its own. So no CTA idles on an odd tail.
// The producer walks the list; the consumers find their tile in shared memory beside its first stage.
#pragma once
#include "cuda/hopper/gemm/tile_walk.cuh"

namespace machmoe::cuda::hopper {

struct CtaTile {
  int expert, row, row_end, column;   // row == row_end: no rows, the list ended between the two CTAs; expert < 0: no tile at all
  DEV bool valid() const { return expert >= 0; }
  DEV int rows() const { return min(row_end - row, kTileRows); }
};
struct ClusterTile : CtaTile {
  bool shared;                        // the other CTA of the cluster multiplies by the same weights
};

// step.entries counts tiles, step.work lists them; an entry of the walk is a pair of them.
DEV bool walk_ended(const TileWalk& at, int tiles) { return 2 * at.entry >= tiles; }
DEV ClusterTile cluster_tile(const TileWalk& at, const WalkStep& step, int tiles, int rank) {
  if (walk_ended(at, tiles)) return {-1, 0, 0, 0, false};
  const int index = 2 * at.entry + rank, last = tiles - 1;
  const int4* list = reinterpret_cast<const int4*>(step.work);
  const int4 t = __ldg(list + min(index, last));
  const int other = __ldg(&list[min(index ^ 1, last)].x);
  return {t.x, index > last ? t.z : t.y, t.z, at.rotated(step), t.x == other};
}

// Clusters of the persistent grid: at most one per pair of tiles and column of the largest routing.
inline WalkStep pair_walk(const WorkList& work, int64_t R_cap, int64_t E, int64_t columns, int sms, int& clusters) {
  clusters = static_cast<int>(std::min<int64_t>(sms / 2, columns * ((work_capacity(R_cap, E, kTileRows) + 1) / 2)));
  return WalkStep::make(&work.header->tiles, work.tiles, columns, clusters);
}

}  // namespace machmoe::cuda::hopper
