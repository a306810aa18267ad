// Consumers: how the two warpgroups share the tiles of a CTA.
#pragma once
#include <type_traits>

#include "cuda/hopper/gemm/ring.cuh"

namespace machmoe::cuda::hopper {

// kBlocks blocks of 64 rows x N columns over one stage. a, b: shared-memory addresses.
template <int N, int kBlocks, int kColumns>
DEV void multiply(float (&acc)[kBlocks][kColumns / 2], int blocks, uint32_t a, uint32_t b, bool accumulate) {
  const uint64_t da = desc_sw128(a, 16, 1024), db = desc_sw128(b, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / 16; k++)
#pragma unroll
    for (int i = 0; i < kBlocks; i++)
      if (i < blocks) Wgmma<N, 0, 0>::mma(*reinterpret_cast<float(*)[N / 2]>(&acc[i][0]), da + 2 * k + 512 * i, db + 2 * k, accumulate || k > 0);
  wgmma_commit();
}

// Calls f with the width to multiply by: that of the tile, or the narrowest of 64, 128 and kColumns that covers its last columns.
template <int kColumns, bool kNarrow, class F>
DEV void with_width(int columns, F&& f) {
  if constexpr (kNarrow) {
    if (columns <= 64) return f(std::integral_constant<int, 64>());
    if (columns <= 128) return f(std::integral_constant<int, 128>());
  }
  f(std::integral_constant<int, kColumns>());
}

// Both warpgroups share a tile: 64 rows each. One without rows only releases the stages.
template <int kColumns, int kStages>
struct Cooperative {
  using R = Ring<kColumns, kStages>;
  static constexpr int kConsumerWarps = 8;  // that release a stage
  static constexpr int kStride = 1;         // tiles from one of a warpgroup to its next

  // more: there is a first tile.
  template <class Epilogue, bool kProxyFence>
  DEV static void consume(const R& ring, Epilogue& epilogue, bool more, int w, int warp, int lane, int k_blocks) {
    float acc[1][kColumns / 2];
    Slot<R> slot;
    while (more) {
      mbar_wait(ring.full(slot.stage), slot.phase);
      const CtaTile t = ring.posted(slot.stage, more);
      const int row = t.row + w * 64;
      const bool any = row < t.row_end;
      with_width<kColumns, Epilogue::kNarrow>(epilogue.columns(t), [&](auto width) {
        int previous = -1;
#pragma unroll 1
        for (int k = 0; k < k_blocks; k++) {
          mbar_wait(ring.full(slot.stage), slot.phase);
          if constexpr (kProxyFence) fence_proxy_async();
          if (any) multiply<width, 1, kColumns>(acc, 1, ring.a(slot.stage) + w * 8192, ring.b(slot.stage), k > 0);
          wgmma_wait<1>();
          if (previous >= 0) ring.release(previous, lane);
          previous = slot.stage;
          slot.advance();
        }
        wgmma_wait<0>();
        ring.release(previous, lane);
      });
      if (row + warp * 16 < t.row_end) epilogue.store(acc[0], t, row + warp * 16);
    }
  }
};

// Each warpgroup owns a tile of 128 rows: one multiplies while the other runs its epilogue.
// The order barriers 3 and 4 keep the warpgroups in turn; without them a waiting one would be a whole tile of stage uses ahead, beyond what a parity tells.
template <int kColumns, int kStages>
struct PingPong {
  using R = Ring<kColumns, kStages>;
  static constexpr int kConsumerWarps = 4;
  static constexpr int kStride = 2;

  template <class Epilogue, bool kProxyFence>
  DEV static void consume(const R& ring, Epilogue& epilogue, bool more, int w, int warp, int lane, int k_blocks) {
    float acc[2][kColumns / 2];
    Slot<R> slot;
    if (w == 1) {
      slot.skip(k_blocks);
      bar_arrive(3, 256);  // warpgroup 0 starts
    }
    while (more) {
      bar_sync(3 + w, 256);  // my turn at the tensor cores
      mbar_wait(ring.full(slot.stage), slot.phase);
      const CtaTile t = ring.posted(slot.stage, more);
      const int rows = t.rows();
      with_width<kColumns, Epilogue::kNarrow>(epilogue.columns(t), [&](auto width) {
        int previous = -1;
#pragma unroll 1
        for (int k = 0; k < k_blocks; k++) {
          mbar_wait(ring.full(slot.stage), slot.phase);
          if constexpr (kProxyFence) fence_proxy_async();
          if (rows > 0) multiply<width, 2, kColumns>(acc, 2, ring.a(slot.stage), ring.b(slot.stage), k > 0);
          wgmma_wait<1>();
          if (previous >= 0) ring.release(previous, lane);
          previous = slot.stage;
          slot.advance();
        }
        bar_arrive(4 - w, 256);  // all issued: the other warpgroup may start
        wgmma_wait<0>();
        ring.release(previous, lane);
      });
      slot.skip(k_blocks);  // those of the other warpgroup
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (i * 64 + warp * 16 < rows) epilogue.store(acc[i], t, t.row + i * 64 + warp * 16);
    }
  }
};

}  // namespace machmoe::cuda::hopper
