// Consumers: the two warpgroups multiply the tiles of their CTA and send them through the epilogue.
#pragma once
#include <type_traits>
#include <utility>

#include "cuda/hopper/gemm/multiply.cuh"
#include "cuda/hopper/tile/fragment.cuh"

namespace machmoe::cuda::hopper {

// Calls f with the width to multiply by: that of the tile, or the narrowest of 64, 128, 192 and kColumns that covers its last columns.
template <int kColumns, bool kNarrow, class F>
DEV void with_width(int columns, F&& f) {
  if constexpr (kNarrow) {
    if (columns <= 64) return f(std::integral_constant<int, 64>());
    if (columns <= 128) return f(std::integral_constant<int, 128>());
    if (columns <= 192) return f(std::integral_constant<int, 192>());
  }
  f(std::integral_constant<int, kColumns>());
}

// f(0), f(1), ... f(N - 1), as constants.
template <int N, class F>
DEV void each(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (f(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// Both warpgroups share a tile, 64 rows each. A finished tile is held as packed bf16 and goes through its epilogue in kChunks pieces, each beside
// products of the next tile: the tensor cores work on while the epilogue computes.
template <int kColumns, int kStages>
struct Held {
  using R = Ring<kColumns, kStages>;

  // w, warp: this warpgroup of the two, and its warp. more: there is a first tile.
  template <class Epilogue, bool kGathered, bool kPanels>
  DEV static void consume(const R& ring, Epilogue& epilogue, bool more, int w, int warp, int k_blocks) {
    constexpr int kChunks = Epilogue::kChunks;
    float acc[kColumns / 2];
    uint32_t held[kColumns / 4];
    Slot<R> slot;
    int blocks = uniform(more) ? k_blocks : 0, done;  // of the tile to multiply; the last round, of none, only empties what is held
    do {
      CtaTile t{};
      if (blocks > 0) {
        mbar_wait(ring.full(slot.stage), slot.phase);
        t = ring.posted(slot.stage);
      }
      const int columns = epilogue.columns(t);
      const bool any = t.row + w * 64 < t.row_end;
      epilogue.begin(t, t.row + w * 64 + warp * 16);
      int chunk = 0, due = -blocks;  // chunk c is due once k / blocks >= (c + 1) / (kChunks + 1)
#pragma unroll 1
      for (int k = 0; k < blocks || chunk < kChunks; k++) {
        if (k < blocks) {
          mbar_wait(ring.full(slot.stage), slot.phase);
          if constexpr (kGathered) fence_proxy_async();  // cp.async writes through the generic proxy
          with_width<kColumns, Epilogue::kNarrow>(columns, [&](auto width) {
            if (any) multiply<width, false, kPanels>(acc, ring.a(slot.stage) + w * 8192, ring.b(slot.stage), k > 0);
          });
          wgmma_wait<1>();
          if (k > 0) ring.release(slot.previous());
          slot.advance();
          due += kChunks + 1;
        }
        epilogue.refill();
        if (chunk < kChunks && due >= 0) {
          each<kChunks>([&](auto c) {
            if (chunk == c) epilogue.chunk(c, held);
          });
          chunk++;
          due -= blocks;
        }
      }
      wgmma_wait<0>();
      if (blocks > 0) ring.release(slot.previous());
      done = blocks;
      blocks = uniform(epilogue.complete(acc)) ? k_blocks : 0;
#pragma unroll
      for (int i = 0; i < kColumns / 4; i++) held[i] = pack(acc[2 * i], acc[2 * i + 1]);
    } while (done > 0);
  }
};

}  // namespace machmoe::cuda::hopper
