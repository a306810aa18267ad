// The grouped GEMM over ragged rows, out[rows of e] = epilogue(rows times the weights of e) = schedule x loader x kind of weights x epilogue.
//   warpgroup 0      the loader fills the ring
//   warpgroups 1, 2  the schedule multiplies, each warp stores its rows through its own epilogue
// One persistent CTA an SM, clusters of two: see cta_tile.cuh.
#pragma once
#include <algorithm>

#include "cuda/hopper/gemm/load.cuh"
#include "cuda/hopper/gemm/schedule.cuh"
#include "cuda/launch.h"
#include "ops.h"

namespace machmoe::cuda::hopper {

// Rows past the last one of all experts, to be zeroed by warps that the loader leaves idle.
struct UnusedRows {
  uint4* data = nullptr;      // [R_cap, chunks], null: leave them
  const int* rows = nullptr;  // R
  int R_cap = 0, chunks = 0;  // 16-byte chunks of a row

  DEV void zero(int thread, int threads) const {
    const size_t end = static_cast<size_t>(R_cap) * chunks;
    for (size_t i = static_cast<size_t>(__ldg(rows)) * chunks + thread; i < end; i += threads) data[i] = uint4{};
  }
};

template <class Loader, class Epilogue, class Weights = WeightTiles>
struct GroupedGemmParams {
  TileTurns turns;
  Weights weights;
  typename Loader::Params rows;
  typename Epilogue::Params epilogue;
  UnusedRows unused;
  int k_blocks;
};

// Shared memory: the ring's stages, what each consumer warp stages for the copy engine, what it notes, the ring's control, the turns.
template <class Schedule, class Epilogue>
struct SharedLayout {
  using R = typename Schedule::R;
  static constexpr int kStaging = R::kBytes, kNotes = kStaging + 8 * Epilogue::kStagingBytes, kControl = kNotes + 8 * Epilogue::kNoteBytes,
                       kTurns = kControl + R::kControlBytes, kBytes = kTurns + TurnSlots::kBytes;
  static_assert(kBytes <= kMaxSharedBytes && R::kStages + 4 <= TurnSlots::kSlots);
};

template <class Schedule, class Loader, class Epilogue, class Weights = WeightTiles>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kGemmThreads, 1)
    grouped_gemm(const __grid_constant__ GroupedGemmParams<Loader, Epilogue, Weights> p) {
  using R = typename Schedule::R;
  extern __shared__ __align__(1024) uint8_t smem[];
  using Layout = SharedLayout<Schedule, Epilogue>;
  const uint32_t stages = smem_u32(smem);
  const R ring{stages, stages + Layout::kControl};
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128), tid = static_cast<int>(threadIdx.x) % 128, rank = cluster_ctarank();

  if (threadIdx.x == 0) {
    ring.init(Loader::kArrivals);
    TurnSlots::init(stages + Layout::kTurns);
  }
  cluster_sync();
  cudaGridDependencySynchronize();
  const int tiles = p.turns.header->tiles;  // by no constant load: ptxas moves it up before the wait
  const bool any = uniform(blockIdx.x / 2 < p.turns.order.items(tiles));

  if (warpgroup == 0) {
    reg_dec<40>();  // 128 x 40 + 256 x 232: what the launch took, 384 x 168. More would wait for ever
    Loader::template produce<R>(p.rows, p.weights, ring, {p.turns, stages + Layout::kTurns, tiles, rank, tid}, tid, p.k_blocks);
    if (p.unused.data && tid >= 32) p.unused.zero(blockIdx.x * 96 + tid - 32, gridDim.x * 96);
  } else {
    reg_inc<232>();
    const int w = warpgroup - 1, warp = uniform(tid / 32);
    const int slot = w * 4 + warp;
    Epilogue epilogue(p.epilogue, stages + Layout::kStaging + slot * Epilogue::kStagingBytes, stages + Layout::kNotes + slot * Epilogue::kNoteBytes);
    Schedule::template consume<Epilogue, Loader::kGathered, Weights::kPanels>(ring, epilogue, any, w, warp, p.k_blocks);
    epilogue.finish();
  }
  cluster_sync();  // no CTA leaves while its peer may still arrive here
}

// columns: column tiles. The persistent grid has at most one cluster per pair of row tiles and column tile of the largest routing.
template <class Schedule, class Loader, class Epilogue, class Weights>
void launch_grouped_gemm(GroupedGemmParams<Loader, Epilogue, Weights>& p, const Shape& s, const Routing& r, int64_t columns, uint32_t* turns,
                         Stream stream) {
  const WorkList work = work_list(r.tiles, s.E);
  const int64_t pairs = (work_capacity(s.R_cap, s.E) + 1) / 2;
  const int clusters = static_cast<int>(std::min<int64_t>(num_sms() / 2, columns * pairs));
  p.turns = TileTurns::make(TileOrder::make(Loader::kGathered, columns), work.header, work.tiles, turns);
  launch_kernel(grouped_gemm<Schedule, Loader, Epilogue, Weights>, 2 * clusters, kGemmThreads, SharedLayout<Schedule, Epilogue>::kBytes, stream, p);
}

}  // namespace machmoe::cuda::hopper
