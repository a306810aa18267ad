// The ring of operand stages between the producer and the consumer warpgroups of a CTA, in shared memory:
//   A [kStages][128 rows][64], B [kStages][kColumns rows][64]  bf16 under the 128-byte swizzle, K-major or as MN-major panels
//   full[s]   the producers of the stage -> its consumers;  empty[s]  every consumer warp of both CTAs -> the producers (weights are multicast)
//   tile[s]   the tile whose first stage this is; written before full[s], read before the stage is released
#pragma once
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

constexpr int kGemmThreads = 384;              // of a CTA: a producer and two consumer warpgroups
constexpr int kBlockK = 64;                    // of a stage: one row of the swizzle, 128 bytes
constexpr int kPanelBytes = 64 * kBlockK * 2;  // of an MN-major panel: kBlockK rows of 64 columns
constexpr int kMaxSharedBytes = 232448;        // of a CTA on sm_90

template <int kColumns_, int kStages_>
struct Ring {
  static constexpr int kColumns = kColumns_, kStages = kStages_;
  static constexpr int kABytes = kTileRows * kBlockK * 2, kBBytes = kColumns * kBlockK * 2;
  static constexpr int kBytes = kStages * (kABytes + kBBytes), kControlBytes = 32 * kStages;

  uint32_t stages, control;  // shared-memory addresses

  DEV uint32_t a(int s) const { return stages + s * kABytes; }
  DEV uint32_t b(int s) const { return stages + kStages * kABytes + s * kBBytes; }
  DEV uint32_t full(int s) const { return control + 8 * s; }
  DEV uint32_t empty(int s) const { return control + 8 * (kStages + s); }
  DEV uint32_t tile(int s) const { return control + 16 * (kStages + s); }

  DEV void init(int producer_arrivals) const {
    for (int s = 0; s < kStages; s++) {
      mbar_init(full(s), producer_arrivals);
      mbar_init(empty(s), 2 * 8);
    }
    mbar_init_fence();
  }
  template <class Tile>
  DEV void post(int s, const Tile& t) const {
    store_shared(tile(s), t.packed());
  }
  template <class Tile>
  DEV Tile posted(int s) const {
    return Tile::of(load_shared(tile(s)));
  }
  // Whom a lane of a consumer warp tells that a stage is free: empty[0] of CTA `lane` of the cluster, 0 for no one.
  DEV uint32_t peer() const {
    const int lane = lane_id();
    return lane < 2 ? cluster_address(empty(0), lane) : 0;
  }
  // By every lane of a consumer warp: done with the stage, told to both CTAs.
  DEV void release(int s, uint32_t peer) const {
    if (peer) mbar_arrive_cluster(peer + 8 * s);
  }
};

// A stage and the parity of its use.
template <class R>
struct Slot {
  int stage = 0;
  uint32_t phase = 0;
  DEV void advance() {
    if (++stage == R::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  DEV int previous() const { return (stage == 0 ? R::kStages : stage) - 1; }
};

}  // namespace machmoe::cuda::hopper
