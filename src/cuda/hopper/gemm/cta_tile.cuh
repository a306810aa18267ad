// The work of a cluster of two CTAs: tiles 2 i and 2 i + 1 of the work list (128 rows each), times one column tile.
// Mostly both belong to one expert and share its weights; where an expert ends in between, each CTA loads its own. So no CTA idles on an odd tail.
// The producer reads the list; the consumers find their tile in shared memory beside its first stage.
#pragma once
#include "cuda/hopper/gemm/tile_order.h"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

// As the consumers see it. row == row_end: no rows.
struct CtaTile {
  int expert, row, row_end, column;
  bool more;  // the consumer has another tile after this one

  DEV int4 packed() const { return {expert << 1 | more, row, row_end, column}; }
  DEV static CtaTile of(int4 t) { return {t.x >> 1, t.y, t.z, t.w, (t.x & 1) != 0}; }
};

// As the producer sees it.
struct ClusterTile {
  int expert, row, row_end;
  int other;  // expert of the other CTA of the cluster
  int column;
  int present;  // tiles from this one to the end of the list; 0: the list ended between the two CTAs, -1: before them

  DEV bool valid() const { return present >= 0; }
  DEV bool shared() const { return expert == other; }  // both CTAs multiply by the same weights
  DEV int rows() const { return present > 0 ? min(row_end - row, kTileRows) : 0; }
  DEV CtaTile posted(bool more) const { return {expert, present > 0 ? row : row_end, row_end, column, more}; }
};

// The tile of CTA `rank` at a place, loaded by one thread. It is loaded one tile ahead, so that nothing waits for it.
DEV ClusterTile load_tile(const WorkTile* list, int tiles, const TilePlace& place, int rank) {
  if (place.pair < 0) return {0, 0, 0, 0, 0, -1};
  const int index = 2 * place.pair + rank, last = tiles - 1;
  const int4 own = __ldg(reinterpret_cast<const int4*>(list + min(index, last)));
  return {own.x, own.y, own.z, __ldg(&list[min(index ^ 1, last)].expert), place.column, tiles - index};
}

// The same for a warp, its words spread over the lanes: lane l holds word l % 4 of its own entry, or with l & 4 of the other CTA's. A value that all lanes
// share would go to a uniform register at once, and the warp wait for it there.
struct SpreadTile {
  int word = 0, column = 0, present = -1;

  DEV SpreadTile(const WorkTile* list, int tiles, const TilePlace& place, int rank) {
    if (place.pair < 0) return;
    const int index = 2 * place.pair + rank, lane = lane_id();
    word = __ldg(reinterpret_cast<const int*>(list + min(lane & 4 ? index ^ 1 : index, tiles - 1)) + lane % 4);
    column = place.column;
    present = tiles - index;
  }
  DEV ClusterTile gather() const {
    const auto at = [&](int lane) { return __shfl_sync(~0u, word, lane); };
    return {at(0), at(1), at(2), at(4), column, present};
  }
};

}  // namespace machmoe::cuda::hopper
