// One warp's way out: boxes of 16 rows x kBox columns are staged in shared memory and leave by tensor stores that end exactly at the expert's last row.
#pragma once
#include "core/types.h"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"

namespace machmoe::cuda::hopper {

template <int kBox, int kBuffers> struct RowStore {
  static constexpr int kBufferBytes = kRaggedRows * kBox * 2, kWarpBytes = kBuffers * kBufferBytes;

  uint32_t base;       // shared memory of this warp
  int lane, buffer = 0;

  // The next buffer, once its last store has been read.
  DEV void acquire() const {
    if (lane == 0) bulk_wait_read<kBuffers - 1>();
    __syncwarp();
  }
  // Column blocks j and j + 1 (8 columns each): rows low and high of j, then of j + 1.
  DEV void put(int j, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) const {
    stmatrix_x4(base + buffer * kBufferBytes + matrix_offset<kBox>(lane, j), r0, r1, r2, r3);
  }
  // The first min(rows, 16) rows of the box to rows row .. of a ragged_store_map.
  DEV void publish(const CUtensorMap* map, int column, int row, int rows, int plane) {
    const int v = min(rows, kRaggedRows);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      tma_store_4d(map, base + buffer * kBufferBytes, column, kRaggedRows - v, row + v, plane);
      bulk_commit();
    }
    buffer = buffer + 1 == kBuffers ? 0 : buffer + 1;
  }
  DEV void finish() const { if (lane == 0) bulk_wait<0>(); }
};

// b[e, column], 0 from `columns` on. The load keeps its place: gathered ahead the values of a tile would not fit into registers.
DEV float bias_at(const ConstBias& b, int expert, int column, int columns) {
  if (column >= columns) return 0.f;
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(static_cast<const bf16*>(b.base) + (expert * b.expert_stride + column * b.stride)));
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}

}  // namespace machmoe::cuda::hopper
