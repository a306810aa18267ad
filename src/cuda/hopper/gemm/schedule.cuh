// Consumers: the two warpgroups multiply the tiles of their CTA and send them through the epilogue.
#pragma once
#include <type_traits>

#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/multiply.cuh"
#include "cuda/hopper/tile/fragment.cuh"

namespace machmoe::cuda::hopper {

// Calls f with the width to multiply by: kColumns, or of a narrow tile the narrowest of 64, 128, 192 that covers its columns; without columns not at all.
// The usual width comes first: every k block passes here.
template <int kColumns, bool kNarrow, class F>
DEV void with_width(int columns, F&& f) {
  if (columns > (kNarrow ? 192 : 0)) return f(std::integral_constant<int, kColumns>());
  if constexpr (kNarrow) {
    if (columns > 128) return f(std::integral_constant<int, 192>());
    if (columns > 64) return f(std::integral_constant<int, 128>());
    if (columns > 0) f(std::integral_constant<int, 64>());
  }
}

// f(i) with a constant i of kBegin .. kEnd - 1, found by bisection.
template <int kBegin, int kEnd, class F>
DEV void with_constant(int i, F&& f) {
  constexpr int kMiddle = (kBegin + kEnd) / 2;
  if constexpr (kEnd - kBegin == 1) f(std::integral_constant<int, kBegin>());
  else if (i < kMiddle) with_constant<kBegin, kMiddle>(i, f);
  else with_constant<kMiddle, kEnd>(i, f);
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
    const uint32_t peer = ring.peer();
    Slot<R> slot;
    int blocks = uniform(more) ? k_blocks : 0, done;  // of the tile to multiply; the last round, of none, only empties what is held
    do {
      CtaTile t{};
      if (blocks > 0) {
        mbar_wait(ring.full(slot.stage), slot.phase);
        t = ring.template posted<CtaTile>(slot.stage);
      }
      const bool any = t.row + w * 64 < t.row_end;
      const int columns = any ? epilogue.columns(t) : 0;
      epilogue.begin(t, t.row + w * 64 + warp * 16);
      int chunk = 0, due = -blocks;  // chunk c is due once k / blocks >= (c + 1) / (kChunks + 1)
#pragma unroll 1
      for (int k = 0; k < blocks || chunk < kChunks; k++) {
        if (k < blocks) {
          mbar_wait(ring.full(slot.stage), slot.phase);
          if constexpr (kGathered) fence_proxy_async();  // cp.async writes through the generic proxy
          with_width<kColumns, Epilogue::kNarrow>(
              columns, [&](auto width) { multiply<width, false, kPanels>(acc, ring.a(slot.stage) + w * 8192, ring.b(slot.stage), k > 0); });
          wgmma_wait<1>();
          if (k > 0) ring.release(slot.previous(), peer);
          slot.advance();
          due += kChunks + 1;
        }
        epilogue.refill();
        if (chunk < kChunks && due >= 0) {
          with_constant<0, kChunks>(chunk, [&](auto c) { epilogue.chunk(c, held); });
          chunk++;
          due -= blocks;
        }
      }
      wgmma_wait<0>();
      if (blocks > 0) ring.release(slot.previous(), peer);
      done = blocks;
      blocks = uniform(epilogue.complete(acc)) ? k_blocks : 0;
#pragma unroll
      for (int i = 0; i < kColumns / 4; i++) held[i] = pack(acc[2 * i], acc[2 * i + 1]);
    } while (done > 0);
  }
};

}  // namespace machmoe::cuda::hopper
