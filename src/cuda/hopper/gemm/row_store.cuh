// One warp's way out: boxes of 16 rows x 64 columns are staged in shared memory and leave by tensor stores that end exactly at the expert's last
// row.
#pragma once
#include "core/types.h"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"

namespace machmoe::cuda::hopper {

struct RowStore {
  static constexpr int kBox = 64, kBuffers = 2;
  static constexpr int kBufferBytes = kRaggedRows * kBox * 2, kBytes = kBuffers * kBufferBytes;

  uint32_t base;  // shared memory of this warp
  int buffer = 0;

  // The next buffer, once its last store has been read.
  DEV void acquire() const {
    if (lane_id() == 0) bulk_wait_read<kBuffers - 1>();
    __syncwarp();
  }
  // Fills the buffer. pairs(i) = held pairs i and i + 1 of the box, a block of 8 columns: of the low and of the high row.
  template <class F>
  DEV void put(F&& pairs) const {
    const uint32_t box = base + buffer * kBufferBytes;
    const int lane = lane_id();
#pragma unroll
    for (int j = 0; j < kBox / 8; j += 2) {
      const uint2 first = pairs(2 * j), second = pairs(2 * j + 2);
      stmatrix_x4(box + matrix_offset(lane, j), first.x, first.y, second.x, second.y);
      __syncwarp();  // a fence for the compiler: two blocks at once do not fit into registers
    }
  }
  // The first min(rows, 16) rows of the box to rows row .. of a ragged_map.
  DEV void publish(const CUtensorMap* map, int column, int row, int rows, int plane) {
    const int v = min(rows, kRaggedRows);
    fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) {
      tma_store_4d(map, base + buffer * kBufferBytes, column, kRaggedRows - v, row + v, plane);
      bulk_commit();
    }
    buffer = buffer + 1 == kBuffers ? 0 : buffer + 1;
  }
  DEV void finish() const {
    if (lane_id() == 0) bulk_wait<0>();
  }
};

// b[e, column], 0 from `columns` on. The load keeps its place: gathered ahead the values of a tile would not fit into registers.
DEV float bias_at(const ConstBias& b, int expert, int column, int columns) {
  if (column >= columns) return 0.f;
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(static_cast<const bf16*>(b.base) + (expert * b.expert_stride + column * b.stride)));
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}

}  // namespace machmoe::cuda::hopper
