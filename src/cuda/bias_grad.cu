// db1, db2: column sums over the rows of an expert. A block takes 256 columns of one expert: 32 threads of 8 columns x 8 rows at a time, then the
// 8 partial sums in order.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace machmoe::cuda {
namespace {

constexpr int kColumns = 256, kRowLanes = 8;

struct ColumnSum {
  const bf16* rows;        // row r starts at rows + (token ? token[r] : r) ld
  int64_t ld;
  const int* token;
  const float* score;      // factor of a row, null: 1
  const int* offsets;
  int64_t columns;
  MutableBias out;
  bool accumulate;
};

template <class Out> __global__ void __launch_bounds__(256) column_sum_kernel(const __grid_constant__ ColumnSum p) {
  __shared__ float partial[kRowLanes][kColumns];
  const int e = blockIdx.y, lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * kColumns + lane * 8;
  float sum[8] = {};
  if (column < p.columns) {
#pragma unroll 4
    for (int row = p.offsets[e] + group; row < p.offsets[e + 1]; row += kRowLanes) {
      float v[8];
      Vec8::load(p.rows + int64_t{p.token ? p.token[row] : row} * p.ld + column).to(v);
      const float factor = p.score ? p.score[row] : 1.f;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] = fmaf(factor, v[j], sum[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) partial[group][lane * 8 + j] = sum[j];
  __syncthreads();
  const int64_t c = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  if (c >= p.columns) return;
  Out* out = static_cast<Out*>(p.out.base) + e * p.out.expert_stride + c * p.out.stride;
  float total = p.accumulate ? static_cast<float>(*out) : 0.f;
#pragma unroll
  for (int g = 0; g < kRowLanes; g++) total += partial[g][threadIdx.x];
  *out = static_cast<Out>(total);
}

void launch(const BiasGradArgs& a, const ColumnSum& p, Stream stream) {
  if (!p.out.base) return;
  const dim3 grid(static_cast<unsigned>((p.columns + kColumns - 1) / kColumns), static_cast<unsigned>(a.shape.E));
  if (a.out_dtype == DType::F32) column_sum_kernel<float><<<grid, 256, 0, stream_of(stream)>>>(p);
  else column_sum_kernel<bf16><<<grid, 256, 0, stream_of(stream)>>>(p);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

}  // namespace

void bias_grad(const BiasGradArgs& a, Stream stream) {
  const Shape& s = a.shape;
  const int64_t ld = s.planes() * s.n;
  const auto* dh = static_cast<const bf16*>(a.dh);
  const int* offsets = a.routing.offsets;
  if (s.act.gated()) launch(a, {dh, ld, nullptr, nullptr, offsets, s.n, a.db1_gate, a.accumulate}, stream);
  launch(a, {dh + (s.planes() - 1) * s.n, ld, nullptr, nullptr, offsets, s.n, a.db1_up, a.accumulate}, stream);
  launch(a, {static_cast<const bf16*>(a.d_o), s.d, a.routing.token, static_cast<const float*>(a.routing.score), offsets, s.d, a.db2, a.accumulate}, stream);
}

}  // namespace machmoe::cuda
