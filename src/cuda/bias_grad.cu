// db1, db2: column sums over the rows of an expert. A block takes 64 columns of one expert: 8 threads of 8 columns, 32 rows at a time; then the
// 32 partial sums in order.
#include "cuda/gather.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kColumns = 64, kRowLanes = 32, kThreads = 256;

struct ColumnSum {
  const bf16* rows;  // row r of plane p starts at rows + source[r] ld + p columns
  int64_t ld;
  Gather source;
  bool by_slot;        // the factor of a row stands at its slot, which `source` loads
  const float* score;  // factors, null: 1
  const int* offsets;
  int64_t columns;
  MutableBias out[2];  // of each plane
  bool accumulate;
};

// grid: column chunks, experts, planes
template <class Out>
__global__ void __launch_bounds__(kThreads) column_sum_kernel(const __grid_constant__ ColumnSum p) {
  cudaGridDependencySynchronize();
  constexpr int kUnroll = 4;  // loads in flight
  __shared__ float partial[kRowLanes][kColumns + 4];
  const int e = blockIdx.y, lane = threadIdx.x % 8, group = threadIdx.x / 8, plane = blockIdx.z;
  const int64_t first = int64_t{blockIdx.x} * kColumns, column = first + lane * 8;
  float sum[8] = {};
  if (column < p.columns) {
    const bf16* rows = p.rows + plane * p.columns + column;
    const int end = p.offsets[e + 1];
    for (int base = p.offsets[e] + group; base < end; base += kUnroll * kRowLanes) {
      Vec8 v[kUnroll];
      float factor[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        const int row = base + i * kRowLanes;
        if (row >= end) continue;
        const int loaded = p.source.load(row);
        v[i] = Vec8::load(rows + int64_t{p.source.token(loaded)} * p.ld);
        factor[i] = p.score ? p.score[p.by_slot ? loaded : row] : 1.f;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        if (base + i * kRowLanes >= end) continue;
        float f[8];
        v[i].to(f);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = fmaf(factor[i], f[j], sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) partial[group][lane * 8 + j] = sum[j];
  __syncthreads();
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x >= kColumns || c >= p.columns) return;
  const MutableBias& bias = p.out[plane];
  Out* out = static_cast<Out*>(bias.base) + e * bias.expert_stride + c * bias.stride;
  float total = 0.f;
#pragma unroll
  for (int g = 0; g < kRowLanes; g++) total += partial[g][threadIdx.x];
  *out = static_cast<Out>(p.accumulate ? static_cast<float>(*out) + total : total);
}

void launch(const BiasGradArgs& a, const ColumnSum& p, int64_t planes, Stream stream) {
  const dim3 grid(static_cast<unsigned>((p.columns + kColumns - 1) / kColumns), static_cast<unsigned>(a.shape.E), static_cast<unsigned>(planes));
  launch_kernel(a.out_dtype == DType::F32 ? column_sum_kernel<float> : column_sum_kernel<bf16>, grid, kThreads, 0, stream, p);
}

}  // namespace

void bias_grad(const BiasGradArgs& a, Stream stream) {
  const Shape& s = a.shape;
  check_aligned(a.d_o, "d_o");
  const int* offsets = a.routing.offsets;
  const auto* score = static_cast<const float*>(a.routing.score);
  if (a.db1_up.base) {
    const bool gated = s.act.gated();
    launch(
        a,
        {static_cast<const bf16*>(a.dh), s.planes() * s.n, {}, false, nullptr, offsets, s.n, {gated ? a.db1_gate : a.db1_up, a.db1_up}, a.accumulate},
        s.planes(), stream);
  }
  const bool topk = s.kind == RoutingKind::TopK;
  if (a.db2.base)
    launch(a, {static_cast<const bf16*>(a.d_o), s.d, Gather(row_source(s, a.routing)), topk, score, offsets, s.d, {a.db2, {}}, a.accumulate}, 1,
           stream);
}

}  // namespace machmoe::cuda
