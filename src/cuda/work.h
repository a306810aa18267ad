// The work list that the metadata kernels write into Routing::tiles and the grouped GEMMs read: no scan over experts, no host sync.
#pragma once
#include <cstddef>
#include <cstdint>

namespace machmoe::cuda {

// Rows row .. min(row + kRows, row_end) - 1 of one expert, with kRows = 128 (tiles) or 256 (pairs, for 2x1 clusters).
// Both lists are in order of expert and row. Readable as one int4.
struct alignas(16) WorkTile {
  int32_t expert;
  int32_t row;
  int32_t row_end;  // end of the expert's rows
  int32_t index;    // of this tile among those of the expert
};
struct alignas(16) WorkHeader {
  int32_t pairs;   // valid entries of the list of pairs
  int32_t tiles;   // valid entries of the list of tiles
  int32_t rows;    // R
  int32_t unused;  // the lists start on 16 bytes
};
constexpr int kTileRows = 128;
constexpr int kPairRows = 256;

// Upper bound of sum_e ceil(f_e / rows) over all routings of at most R_cap rows.
constexpr int64_t work_capacity(int64_t R_cap, int64_t E, int64_t rows) { return R_cap / rows + (E < R_cap ? E : R_cap); }

// Routing::tiles = WorkHeader, WorkTile pairs[work_capacity(256)], WorkTile tiles[work_capacity(128)].
constexpr size_t work_bytes(int64_t R_cap, int64_t E) {
  return sizeof(WorkHeader) + sizeof(WorkTile) * static_cast<size_t>(work_capacity(R_cap, E, kPairRows) + work_capacity(R_cap, E, kTileRows));
}
// The views, on host and device addresses alike.
struct WorkList {
  WorkHeader* header;
  WorkTile* pairs;
  WorkTile* tiles;
};
inline WorkList work_list(int32_t* buffer, int64_t R_cap, int64_t E) {
  auto* header = reinterpret_cast<WorkHeader*>(buffer);
  auto* pairs = reinterpret_cast<WorkTile*>(header + 1);
  return {header, pairs, pairs + work_capacity(R_cap, E, kPairRows)};
}

}  // namespace machmoe::cuda
