// What one warp's epilogue knows of its tiles: the held one, and the next one in the tensor cores. In shared memory, where no register waits with it.
#pragma once
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/ptx/ptx.cuh"

namespace machmoe::cuda::hopper {

// This warp's rows row .. row + rows - 1 of a column tile, up to 16. rows <= 0: none.
struct WarpTile {
  int expert, row, rows, column;
  bool more;  // another tile follows
};

struct HeldTiles {
  static constexpr int kBytes = 32;

  uint32_t base;  // shared memory of this warp
  uint32_t next = 0;

  DEV HeldTiles(uint32_t notes) : base(notes) {
    if (lane_id() == 0) store_shared(base + 16, {0, 0, 0, 0});
    __syncwarp();
  }
  DEV void begin(const CtaTile& t, int row) const {
    if (lane_id() == 0) store_shared(base + next, {t.expert << 1 | t.more, row, min(t.row_end - row, 16), t.column});
  }
  // The next tile becomes the held one.
  DEV WarpTile complete() {
    __syncwarp();
    next ^= 16;
    return held();
  }
  DEV WarpTile held() const { return at(next ^ 16); }
  DEV WarpTile at(uint32_t slot) const {
    const int4 t = load_shared(base + slot);
    return {t.x >> 1, t.y, t.z, t.w, (t.x & 1) != 0};
  }
};

}  // namespace machmoe::cuda::hopper
