// Y kernel: Y = A W2^T. Rows: Y = s (A W2^T + b2), and the rows past the last expert's are zero.
#include "cuda/hopper/gemm/epilogue_store.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

template <bool kScaled, int kColumns, class Epilogue>
void launch(const DownProjArgs& a, Stream stream) {
  using Schedule = PingPong<kColumns, 4>;
  const Shape& s = a.shape;
  const uint64_t d = s.d, n = s.n, E = s.E, R_cap = s.R_cap;
  const WorkList work = work_list(a.routing.tiles, s.R_cap, s.E);
  GroupedGemmParams<TmaRows, Epilogue> p{};
  int clusters = 0;
  p.k_blocks = static_cast<int>((s.n + kBlockK - 1) / kBlockK);
  p.step = pair_step(work, s.R_cap, s.E, (s.d + kColumns - 1) / kColumns, num_sms(), clusters);
  p.rows.map = tensor_map<bf16>(a.a, {n, R_cap}, {2 * n}, {kBlockK, kTileRows}, 128);
  p.weights.half[0] = p.weights.half[1] =
      tensor_map<bf16>(a.w2.base, {n, d, E}, {2ull * a.w2.row_stride, 2ull * a.w2.expert_stride}, {kBlockK, kColumns / 2, 1}, 128);
  p.weights.step = kColumns;
  p.weights.second = kColumns / 2;
  p.epilogue.y = ragged_store_map(a.y, R_cap, 1, d, Epilogue::kBox);
  p.epilogue.d = static_cast<int>(d);
  if constexpr (kScaled) {
    p.epilogue.score = static_cast<const float*>(a.routing.score);
    p.epilogue.b2 = a.b2;
    p.unused = {static_cast<uint4*>(a.y), &work.header->rows, static_cast<int>(R_cap), static_cast<int>(d / 8)};
  }
  launch_kernel(grouped_gemm<Schedule, TmaRows, Epilogue>, 2 * clusters, grouped_gemm_smem<Schedule, Epilogue>(), stream, p);
}

}  // namespace

void down_proj(const DownProjArgs& a, Stream stream) {
  if (a.shape.R_cap == 0) return;
  // Beside scores and biases the addresses of 192 columns do not fit into registers.
  return a.shape.kind == RoutingKind::Rows ? launch<true, 176, StoreEpilogue<176, 88, 3, true>>(a, stream)
                                           : launch<false, 192, StoreEpilogue<192, 64, 4, false>>(a, stream);
}

}  // namespace machmoe::cuda::hopper
