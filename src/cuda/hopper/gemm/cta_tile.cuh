// The work of a cluster of two CTAs: tiles 2 i and 2 i + 1 of the work list (128 rows each, in order of expert and row), times one column tile.
// Mostly both belong to one expert and share its weights; where an expert ends in between, each CTA loads its own. So no CTA idles on an odd tail.
// The producer walks the list; the consumers find their tile in shared memory beside its first stage.
#pragma once
#include "cuda/hopper/gemm/tile_walk.h"
#include "cuda/hopper/ptx/ptx.cuh"

namespace machmoe::cuda::hopper {

// As the consumers see it. row == row_end: no rows.
struct CtaTile {
  int expert, row, row_end, column;
  bool more;  // the consumer has another tile after this one
};

// As the producer sees it. Loaded one tile ahead: the constructor touches no loaded value, else the producer would wait for it there.
struct ClusterTile {
  int4 work{};    // expert, row, row_end
  int other = 0;  // expert of the other CTA of the cluster
  int column = 0;
  int present = -1;  // tiles from this one to the end of the list; 0: the list ended between the two CTAs, -1: before them

  DEV ClusterTile(const TileWalk& at, const WalkStep& step, int tiles, int rank) {
    if (at.ended(step, tiles)) return;
    const int index = 2 * at.entry(step) + rank, last = tiles - 1;
    const int4* list = reinterpret_cast<const int4*>(step.work);
    present = tiles - index;
    work = __ldg(list + min(index, last));
    other = __ldg(&list[min(index ^ 1, last)].x);
    column = at.rotated(step);
  }
  DEV bool valid() const { return present >= 0; }
  DEV bool shared() const { return work.x == other; }  // both CTAs multiply by the same weights
  DEV int rows() const { return present > 0 ? min(work.z - work.y, kTileRows) : 0; }
  DEV CtaTile posted(bool more) const { return {work.x, present > 0 ? work.y : work.z, work.z, column, more}; }
};

}  // namespace machmoe::cuda::hopper
