// O and dX: every token gathers its rows and adds them in slot order. One block a token, 16 bytes a thread.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace machmoe::cuda {
namespace {

struct AggregateParams {
  Routing routing;
  int64_t T, E;
  int d, K, R_cap;
  int slots_ahead;  // of kTokensAhead tokens, about
  const bf16 *y, *addend, *b2;
  int64_t b2_stride, b2_expert_stride;
  bf16* out;
};

__device__ int expert_of_row(const int* offsets, int64_t E, int row) {
  int64_t low = 0, high = E;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= row) low = middle;
    else high = middle;
  }
  return static_cast<int>(low);
}

// A block waits for the slots of its token (lists), then for the rows, then for Y. The lines of indices that a later block needs are on their way to L2
// meanwhile.
constexpr int kTokensAhead = 2000;
__device__ void prefetch(const int* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// kRows: rows in flight per thread; fewer leave registers for more blocks.
template <bool kTopk, bool kWeighted, bool kBias, int kRows>
__global__ void __launch_bounds__(256, kRows == 2 ? 8
                                       : kBias    ? 4
                                                  : 5) aggregate_kernel(const __grid_constant__ AggregateParams p) {
  cudaGridDependencySynchronize();
  const int64_t t = blockIdx.x;
  const int begin = kTopk ? static_cast<int>(t) * p.K : p.routing.token_offsets[t], end = kTopk ? begin + p.K : p.routing.token_offsets[t + 1];
  if (threadIdx.x == 0 && t + kTokensAhead < p.T) {
    if (!kTopk) prefetch(p.routing.token_offsets + t + kTokensAhead);
    if (begin < p.R_cap - p.slots_ahead) prefetch(p.routing.inverse + begin + p.slots_ahead);
  }
  const auto* score = static_cast<const float*>(p.routing.score);
  for (int column = static_cast<int>(threadIdx.x) * 8; column < p.d; column += static_cast<int>(blockDim.x) * 8) {
    float sum[8] = {};
    if (p.addend) Vec8::load(p.addend + t * p.d + column).to(sum);
    for (int slot = begin; slot < end; slot += kRows) {
      int row[kRows];
      Vec8 y[kRows];
      float s[kRows];
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        row[i] = slot + i < end ? p.routing.inverse[slot + i] : -1;
        if (kTopk && kWeighted) s[i] = slot + i < end ? score[slot + i] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        if (row[i] < 0) continue;
        y[i] = Vec8::load(p.y + int64_t{row[i]} * p.d + column);
        if (!kTopk && kWeighted) s[i] = score[row[i]];
      }
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        if (row[i] < 0) continue;
        float v[8];
        y[i].to(v);
        if constexpr (kBias) {
          const bf16* b2 = p.b2 + expert_of_row(p.routing.offsets, p.E, row[i]) * p.b2_expert_stride;
#pragma unroll
          for (int j = 0; j < 8; j++) v[j] += __bfloat162float(b2[(column + j) * p.b2_stride]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = kWeighted ? fmaf(s[i], v[j], sum[j]) : sum[j] + v[j];
      }
    }
    Vec8::from(sum).store(p.out + t * p.d + column);
  }
}

}  // namespace

void aggregate(const AggregateArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.T == 0) return;
  check_aligned(a.addend, "addend");
  check_aligned(a.out, a.weighted ? "o" : "dx");
  const AggregateParams p{a.routing,
                          s.T,
                          s.E,
                          static_cast<int>(s.d),
                          static_cast<int>(s.K),
                          static_cast<int>(s.R_cap),
                          static_cast<int>(kTokensAhead * s.R_cap / s.T),
                          static_cast<const bf16*>(a.y),
                          static_cast<const bf16*>(a.addend),
                          static_cast<const bf16*>(a.b2.base),
                          a.b2.stride,
                          a.b2.expert_stride,
                          static_cast<bf16*>(a.out)};
  const auto blocks = static_cast<unsigned>(s.T);
  const int64_t vectors = s.d / 8, turns = (vectors + 255) / 256;  // of a block of at most 256 threads over its columns
  const auto threads = static_cast<unsigned>((vectors + 32 * turns - 1) / (32 * turns) * 32);
  const bool few = s.R_cap < 3 * s.T;  // rows a token, with what token rounding may add to two
  const auto launch = [&]<bool kTopk>() {
    const auto kernel = a.weighted && a.b2.base ? aggregate_kernel<kTopk, true, true, 4>
                        : a.weighted            ? (few ? aggregate_kernel<kTopk, true, false, 2> : aggregate_kernel<kTopk, true, false, 4>)
                                                : (few ? aggregate_kernel<kTopk, false, false, 2> : aggregate_kernel<kTopk, false, false, 4>);
    launch_kernel(kernel, blocks, threads, 0, stream, p);
  };
  if (s.kind == RoutingKind::TopK) launch.template operator()<true>();
  else launch.template operator()<false>();
}

}  // namespace machmoe::cuda
