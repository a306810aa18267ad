// The work lists that the metadata kernels write into Routing::tiles and the grouped GEMMs read: no scan over experts, no host sync.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/check.h"

namespace machmoe::cuda {

constexpr int kTileRows = 128;

// Rows row .. min(row + kTileRows, row_end) - 1 of one expert. In the list stand the experts with an even number of tiles, then the others, each with
// its tiles in a row: so of two odd experts only one pair of tiles, 2 i and 2 i + 1, is on different weights. Readable as one int4, its last word unused.
struct alignas(16) WorkTile {
  int32_t expert;
  int32_t row;
  int32_t row_end;  // end of the expert's rows
};
// An expert and its rows, those with the most rows first: the weight gradients take them in this order, so that no long one comes last.
struct alignas(16) WorkExpert {
  int32_t expert;
  int32_t row;
  int32_t row_end;
};
// Padded: the lists start on 16 bytes.
struct alignas(16) WorkHeader {
  int32_t tiles;    // valid entries of the list of tiles
  int32_t rows;     // R
  int32_t experts;  // with rows: the first entries of the list of experts
};

// Upper bound of sum_e ceil(f_e / kTileRows) over all routings of at most R_cap rows.
constexpr int64_t work_capacity(int64_t R_cap, int64_t E) { return R_cap / kTileRows + (E < R_cap ? E : R_cap); }

// Routing::tiles = WorkHeader, WorkExpert experts[E], WorkTile tiles[work_capacity].
constexpr size_t work_bytes(int64_t R_cap, int64_t E) {
  return sizeof(WorkHeader) + sizeof(WorkExpert) * static_cast<size_t>(E) + sizeof(WorkTile) * static_cast<size_t>(work_capacity(R_cap, E));
}
// The views, on host and device addresses alike.
struct WorkList {
  WorkHeader* header;
  WorkExpert* experts;
  WorkTile* tiles;
};
inline WorkList work_list(int32_t* buffer, int64_t E) {
  MACHMOE_CHECK(buffer, "routing.tiles is null, expected the work list that machmoe_routing_carve places: CUDA reads it");
  auto* header = reinterpret_cast<WorkHeader*>(buffer);
  auto* experts = reinterpret_cast<WorkExpert*>(header + 1);
  return {header, experts, reinterpret_cast<WorkTile*>(experts + E)};
}

}  // namespace machmoe::cuda
