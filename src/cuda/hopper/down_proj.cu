// Y kernel: Y = A W2^T. Rows: Y = s (A W2^T + b2), and the rows past the last expert's are zero.
#include "cuda/hopper/gemm/epilogue_store.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

// kBox: columns of a store. 64 are the faster choice; beside scores and biases only the addresses of 32 fit into registers.
template <bool kScaled, int kBox> void launch(const DownProjArgs& a, Stream stream) {
  using Schedule = PingPong<192, 4>;
  using Epilogue = StoreEpilogue<192, kBox, 256 / kBox, kScaled>;
  constexpr int kColumns = Schedule::R::kColumns;
  const Shape& s = a.shape;
  const uint64_t d = s.d, n = s.n, E = s.E, R_cap = s.R_cap;
  const WorkList work = work_list(a.routing.tiles, s.R_cap, s.E);
  GroupedGemmParams<TmaRows, Epilogue> p{};
  int clusters = 0;
  p.step = pair_walk(work, s.R_cap, s.E, (s.d + kColumns - 1) / kColumns, num_sms(), clusters);
  p.k_blocks = static_cast<int>((s.n + kBlockK - 1) / kBlockK);
  p.rows.map = tensor_map<bf16>(a.a, {n, R_cap}, {2 * n}, {kBlockK, kTileRows}, 128);
  p.weights.half[0] = p.weights.half[1] =
      tensor_map<bf16>(a.w2.base, {n, d, E}, {2ull * a.w2.row_stride, 2ull * a.w2.expert_stride}, {kBlockK, kColumns / 2, 1}, 128);
  p.weights.step = kColumns;
  p.weights.second = kColumns / 2;
  p.epilogue.y = ragged_store_map(a.y, R_cap, 1, d, kBox);
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
  return a.shape.kind == RoutingKind::Rows ? launch<true, 32>(a, stream) : launch<false, 64>(a, stream);
}

}  // namespace machmoe::cuda::hopper
