// The launch of the A kernel for an activation.
#pragma once
#include "cuda/gather.cuh"
#include "cuda/hopper/gemm/epilogue_activation.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "ops.h"

namespace machmoe::cuda::hopper {

template <ActivationKind K, bool kGeneral>
void launch_up_proj(const UpProjArgs& a, Stream stream) {
  using Schedule = Held<256, 4>;
  using R = typename Schedule::R;
  using Epilogue = ActivationEpilogue<R::kColumns, K, kGeneral>;
  const Shape& s = a.shape;
  const uint64_t d = s.d, n = s.n, E = s.E;
  GroupedGemmParams<GatherRows, Epilogue> p{};
  p.k_blocks = static_cast<int>((s.d + kBlockK - 1) / kBlockK);
  p.rows = {static_cast<const uint4*>(a.x), Gather(row_source(s, a.routing)), static_cast<int>(s.d / 8)};
  const ConstWeight half[2] = {Epilogue::kGated ? a.w1_gate : a.w1_up, a.w1_up};
  for (int i = 0; i < 2; i++)
    p.weights.half[i] =
        tensor_map<bf16>(half[i].base, {d, n, E}, {2ull * half[i].row_stride, 2ull * half[i].expert_stride}, {kBlockK, R::kColumns / 2, 1}, 128);
  p.weights.step = Epilogue::kWidth;
  p.weights.second = Epilogue::kGated ? 0 : R::kColumns / 2;
  auto& e = p.epilogue;
  e.store_h = a.h != nullptr;
  e.store_a = a.a != nullptr;
  if (e.store_h) e.h = ragged_map(a.h, s.R_cap, s.planes(), n, {Epilogue::kBox});
  if (e.store_a) e.a = ragged_map(a.a, s.R_cap, 1, n, {Epilogue::kBox});
  e.b_gate = a.b1_gate;
  e.b_up = a.b1_up;
  e.n = static_cast<int>(n);
  e.alpha = s.act.alpha;
  e.limit = s.act.limit;
  launch_grouped_gemm<Schedule>(p, s, a.routing, (s.n + Epilogue::kWidth - 1) / Epilogue::kWidth, a.turns, stream);
}

// Each in a file of its own, so that they compile side by side.
void up_proj_gated(const UpProjArgs&, Stream);
void up_proj_plain(const UpProjArgs&, Stream);

}  // namespace machmoe::cuda::hopper
