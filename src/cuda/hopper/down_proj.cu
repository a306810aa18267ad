// Y kernel: Y = A W2^T. Rows: Y = s (A W2^T + b2), and the rows past the last expert's are zero.
#include "cuda/hopper/gemm/epilogue_store.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

template <bool kScaled>
void launch(const DownProjArgs& a, Stream stream) {
  using Schedule = Held<256, 4>;
  using R = Schedule::R;
  using Epilogue = StoreEpilogue<R::kColumns, kScaled>;
  const Shape& s = a.shape;
  const uint64_t d = s.d, n = s.n, E = s.E, R_cap = s.R_cap;
  GroupedGemmParams<TmaRows, Epilogue> p{};
  p.k_blocks = static_cast<int>((s.n + kBlockK - 1) / kBlockK);
  p.rows = {tensor_map<bf16>(a.a, {n, R_cap, 1}, {2 * n, 2 * n * R_cap}, {kBlockK, kTileRows, 1}, 128), p.k_blocks};
  p.weights.half[0] = p.weights.half[1] =
      tensor_map<bf16>(a.w2.base, {n, d, E}, {2ull * a.w2.row_stride, 2ull * a.w2.expert_stride}, {kBlockK, R::kColumns / 2, 1}, 128);
  p.weights.step = R::kColumns;
  p.weights.second = R::kColumns / 2;
  p.epilogue.y = ragged_map(a.y, R_cap, 1, d, {Epilogue::kBox});
  p.epilogue.d = static_cast<int>(d);
  if constexpr (kScaled) {
    p.epilogue.score = static_cast<const float*>(a.routing.score);
    p.epilogue.b2 = a.b2;
    p.unused = {static_cast<uint4*>(a.y), &work_list(a.routing.tiles, s.E).header->rows, static_cast<int>(R_cap), static_cast<int>(d / 8)};
  }
  launch_grouped_gemm<Schedule>(p, s, a.routing, (s.d + R::kColumns - 1) / R::kColumns, a.turns, stream);
}

}  // namespace

void down_proj(const DownProjArgs& a, Stream stream) {
  if (a.shape.R_cap == 0) return;
  if (a.shape.kind == RoutingKind::Rows) launch<true>(a, stream);
  else launch<false>(a, stream);
}

}  // namespace machmoe::cuda::hopper
