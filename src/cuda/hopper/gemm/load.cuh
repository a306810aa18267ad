// Producers. Each loader fills A with the rows of the CTA's tile; the weights B come by tensor copies either way.
#pragma once
#include "cuda/gather.cuh"
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/ring.cuh"
#include "cuda/hopper/gemm/turns.cuh"

namespace machmoe::cuda::hopper {

// B is two halves of kColumns / 2 weight rows: gate and up, or the first and the second half of the same rows. In a cluster on one expert
// CTA r fetches half r and multicasts it.
struct WeightTiles {
  static constexpr bool kPanels = false;
  CUtensorMap half[2];  // {K, rows, E}, box {64, kColumns / 2, 1}; rows past the end are zero
  int step, second;     // rows from one column tile to the next; first row of half 1 within a tile

  template <class R>
  DEV void load(const R& ring, int s, int k, const ClusterTile& t, int rank) const {
    constexpr int kHalfBytes = R::kBBytes / 2;
    const int row = t.column * step;
    if (t.shared()) {
      tma_load_3d_mc(ring.b(s) + rank * kHalfBytes, &half[rank], ring.full(s), k * kBlockK, row + rank * second, t.expert, 3);
    } else {
      tma_load_3d(ring.b(s), &half[0], ring.full(s), k * kBlockK, row, t.expert);
      tma_load_3d(ring.b(s) + kHalfBytes, &half[1], ring.full(s), k * kBlockK, row + second, t.expert);
    }
  }
};

// B as MN-major panels [64 of K][64 columns]. In a cluster on one expert CTA r fetches half r of the panels and multicasts it.
// The reduction runs through `blocks` blocks of one plane, then of the next.
struct WeightPanels {
  static constexpr bool kPanels = true;
  CUtensorMap plane[2];  // {columns, K, E}, box {64, 64, 1}; outside is zero
  int blocks;

  template <class R>
  DEV void load(const R& ring, int s, int k, const ClusterTile& t, int rank) const {
    constexpr int kPanels = R::kColumns / 64, kHalf = kPanels / 2;
    const bool second = k >= blocks, shared = t.shared();
    const CUtensorMap* map = &plane[second];
    const int column = t.column * R::kColumns, row = (k - (second ? blocks : 0)) * kBlockK;
    if (shared) {
#pragma unroll 1
      for (int i = 0; i < kHalf; i++) {
        const int j = rank * kHalf + i;
        tma_load_3d_mc(ring.b(s) + j * kPanelBytes, map, ring.full(s), column + j * 64, row, t.expert, 3);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kPanels; j++) tma_load_3d(ring.b(s) + j * kPanelBytes, map, ring.full(s), column + j * 64, row, t.expert);
    }
  }
};

// Rows gathered by token, by cp.async of all 128 producer threads: 16-byte chunk tid % 8 of the rows tid / 8 + 16 i.
struct GatherRows {
  struct Params {
    const uint4* x;  // [T, chunks] of 16 bytes
    Gather source;   // row -> row of x
    int chunks;
  };
  static constexpr int kArrivals = 129;  // 128 threads and the expected bytes
  static constexpr bool kGathered = true;

  template <class R, class Weights>
  DEV static void produce(const Params& p, const Weights& weights, const R& ring, Turns<TileTurns> turns, int tid, int k_blocks) {
    constexpr int kRows = kTileRows / 16;
    const int lane = tid % 32;
    const uint32_t dst0 = ring.a(0) + (tid / 8) * 128 + (((tid % 8) ^ ((tid / 8) & 7)) << 4);
    // Lane l holds the source of row 4 warp + l % 4 + 16 (l / 4); rows past the tile's end are zero.
    const int own = tid / 32 * 4 + lane % 4 + lane / 4 * 16;
    int loaded = 0;
    auto find = [&](const ClusterTile& t) {
      if (t.rows() <= 0) return;
      loaded = p.source.load(min(t.row + own, t.row_end - 1));
    };
    Slot<R> slot;
    const auto load = [&] { return SpreadTile(turns.p.work, turns.tiles, turns.next(), turns.rank); };
    ClusterTile next = load().gather();  // tiles are loaded two ahead and their rows one ahead, so that nothing here waits for a load
    find(next);
    SpreadTile after = load();
    while (next.valid()) {
      const ClusterTile t = next;
      const uint32_t chunk0 = p.source.token(loaded) * p.chunks, present = __ballot_sync(~0u, own < t.rows()) >> lane / 8;
      next = after.gather();
      find(next);
      after = load();
      const bool low = t.rows() > 0, high = t.rows() > 64;
#pragma unroll 1
      for (int k = 0; k < k_blocks; k++) {
        mbar_wait(ring.empty(slot.stage), slot.phase ^ 1);
        if (tid == 0) {
          if (k == 0) ring.post(slot.stage, t.posted(next.valid()));
          mbar_arrive_expect_tx(ring.full(slot.stage), R::kBBytes);
          weights.load(ring, slot.stage, k, t, turns.rank);
        }
        __syncwarp();
        const uint32_t dst = dst0 + slot.stage * R::kABytes;
        const uint4* x = p.x + k * 8 + tid % 8;
        const int bytes = k * 8 + tid % 8 < p.chunks ? 16 : 0;  // columns past the row are zero
#pragma unroll
        for (int i = 0; i < kRows; i++)
          if (i < kRows / 2 ? low : high)
            cp_async16_zfill(dst + i * 2048, x + __shfl_sync(~0u, chunk0, i * 4 + lane / 8), present >> 4 * i & 1 ? bytes : 0);
        cp_async_mbar_arrive_noinc(ring.full(slot.stage));
        slot.advance();
      }
    }
  }
};

// Contiguous rows by tensor copies of one thread. Rows past the tile's end belong to the next expert: they are computed and clipped by the store.
struct TmaRows {
  struct Params {
    CUtensorMap map;  // {K, R_cap, planes}, box {64, 128, 1}
    int blocks;       // of a plane: the reduction runs through one plane, then the next
  };
  static constexpr int kArrivals = 1;
  static constexpr bool kGathered = false;

  template <class R, class Weights>
  DEV static void produce(const Params& p, const Weights& weights, const R& ring, Turns<TileTurns> turns, int tid, int k_blocks) {
    if (tid != 0) return;
    Slot<R> slot;
    const auto load = [&] { return load_tile(turns.p.work, turns.tiles, turns.next(), turns.rank); };
    ClusterTile next = load();
    while (next.valid()) {
      const ClusterTile t = next;
      next = load();
      const bool any = t.rows() > 0;
#pragma unroll 1
      for (int k = 0; k < k_blocks; k++) {
        mbar_wait(ring.empty(slot.stage), slot.phase ^ 1);
        if (k == 0) ring.post(slot.stage, t.posted(next.valid()));
        mbar_arrive_expect_tx(ring.full(slot.stage), R::kBBytes + (any ? R::kABytes : 0));
        weights.load(ring, slot.stage, k, t, turns.rank);
        const bool second = k >= p.blocks;
        if (any) tma_load_3d(ring.a(slot.stage), &p.map, ring.full(slot.stage), (k - (second ? p.blocks : 0)) * kBlockK, t.row, second);
        slot.advance();
      }
    }
  }
};

}  // namespace machmoe::cuda::hopper
