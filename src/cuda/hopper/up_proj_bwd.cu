// dX~ kernel: dX~ = dH W1. The reduction runs over the columns of the gate plane, then of the up plane. Rows: the rows past the last expert's are zero.
#include "cuda/hopper/gemm/epilogue_store.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {

void up_proj_bwd(const UpProjBwdArgs& a, Stream stream) {
  using Schedule = Held<256, 4>;
  using Epilogue = StoreEpilogue<Schedule::R::kColumns, false>;
  const Shape& s = a.shape;
  if (s.R_cap == 0) return;
  const uint64_t d = s.d, n = s.n, R_cap = s.R_cap, E = s.E, planes = s.planes();
  GroupedGemmParams<TmaRows, Epilogue, WeightPanels> p{};
  const int blocks = static_cast<int>((s.n + kBlockK - 1) / kBlockK);
  p.k_blocks = static_cast<int>(planes) * blocks;
  p.rows = {tensor_map<bf16>(a.dh, {n, R_cap, planes}, {2 * planes * n, 2 * n}, {kBlockK, kTileRows, 1}, 128), blocks};
  const ConstWeight w1[2] = {s.act.gated() ? a.w1_gate : a.w1_up, a.w1_up};
  for (int i = 0; i < 2; i++)
    p.weights.plane[i] = tensor_map<bf16>(w1[i].base, {d, n, E}, {2ull * w1[i].row_stride, 2ull * w1[i].expert_stride}, {64, kBlockK, 1}, 128);
  p.weights.blocks = blocks;
  p.epilogue.y = ragged_map(a.dx_rows, R_cap, 1, d, {Epilogue::kBox});
  p.epilogue.d = static_cast<int>(d);
  if (s.kind == RoutingKind::Rows)
    p.unused = {static_cast<uint4*>(a.dx_rows), &work_list(a.routing.tiles, s.E).header->rows, static_cast<int>(R_cap), static_cast<int>(d / 8)};
  launch_grouped_gemm<Schedule>(p, s, a.routing, (s.d + Schedule::R::kColumns - 1) / Schedule::R::kColumns, a.turns, stream);
}

}  // namespace machmoe::cuda::hopper
