// The work list that the metadata kernels write into Routing::tiles and the grouped GEMMs read: no scan over experts, no host sync.
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
// Padded: the list starts on 16 bytes.
struct alignas(16) WorkHeader {
  int32_t tiles;  // valid entries of the list
  int32_t rows;   // R
};

// Upper bound of sum_e ceil(f_e / kTileRows) over all routings of at most R_cap rows.
constexpr int64_t work_capacity(int64_t R_cap, int64_t E) { return R_cap / kTileRows + (E < R_cap ? E : R_cap); }

// Routing::tiles = WorkHeader, WorkTile tiles[work_capacity].
constexpr size_t work_bytes(int64_t R_cap, int64_t E) { return sizeof(WorkHeader) + sizeof(WorkTile) * static_cast<size_t>(work_capacity(R_cap, E)); }
// The views, on host and device addresses alike.
struct WorkList {
  WorkHeader* header;
  WorkTile* tiles;
};
inline WorkList work_list(int32_t* buffer) {
  MACHMOE_CHECK(buffer, "routing.tiles is null, expected the work list that machmoe_routing_carve places: CUDA reads it");
  auto* header = reinterpret_cast<WorkHeader*>(buffer);
  return {header, reinterpret_cast<WorkTile*>(header + 1)};
}

}  // namespace machmoe::cuda
