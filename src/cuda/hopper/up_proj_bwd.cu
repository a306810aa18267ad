// dX~ = dH W1: [R, d]. The rows of dH are contiguous; the reduction runs over the columns of the gate plane, then of the up plane.
// Ping-pong: each consumer warpgroup owns a 128 x 192 tile and computes while the other stores. The CTAs of a cluster take two row tiles, mostly of
// one expert: then each loads half of the 64 reduction rows of W1 (MN-major panels of 64 columns) and multicasts them to both.
#include <algorithm>
#include <type_traits>

#include "cuda/hopper/gemm/launch.cuh"
#include "cuda/hopper/gemm/tile_walk.cuh"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

constexpr int kM = 128, kN = 192, kStages = 4, kBuffers = 4;
constexpr int kABytes = kM * 128, kPanelBytes = 64 * 128, kBBytes = kN / 64 * kPanelBytes, kBoxBytes = 16 * 128;
constexpr int kStaging = 8 * kBuffers * kBoxBytes;
constexpr int kSmem = kStages * (kABytes + kBBytes) + kStaging + 2 * kStages * 8;
static_assert(kSmem <= 232448);

struct UpProjBwdParams {
  CUtensorMap dh;     // [planes][R_cap][n], box {64, 128, 1}
  CUtensorMap w1[2];  // [E][n][d] per plane, box {64, 32, 1}
  CUtensorMap dx;     // ragged, box {64, 16, 1}
  WalkStep step;
  int d, planes, blocks;  // k-blocks per plane
  bf16* zero_rows;        // Rows: rows R .. R_cap - 1 become zero; else null
  const int* rows;        // R
  int R_cap;
};

__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) up_proj_bwd_kernel(const __grid_constant__ UpProjBwdParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t s_a = smem_u32(raw), s_b = s_a + kStages * kABytes, s_staging = s_b + kStages * kBBytes, bars = s_staging + kStaging;
  auto full = [&](int s) { return bars + 8 * s; };
  auto empty = [&](int s) { return bars + 8 * (kStages + s); };
  const int wg = threadIdx.x / 128, tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32, rank = cluster_ctarank();

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      mbar_init(full(s), 4);
      mbar_init(empty(s), 4 * 2);
    }
    mbar_init_fence();
  }
  cluster_sync();
  const int tiles = __ldg(p.step.entries);
  TileWalk at(p.step, blockIdx.x / 2);

  if (wg == 0) {
    reg_dec<40>();
    if (lane == 0) {  // warps 0 to 2 load a panel of W1 each, warp 3 the rows of dH
      int s = 0;
      uint32_t phase = 0;
      PairedTile next(at, p.step, tiles, rank);
      while (!next.ended) {
        const PairedTile t = next;
        at.advance(p.step);
        next = PairedTile(at, p.step, tiles, rank);  // its latency hides behind this tile
        const int expert = t.expert(), row = t.row(), col = t.column * kN + warp * 64;
        const bool shared = t.shared();
        for (int plane = 0; plane < p.planes; plane++)
          for (int k = 0; k < p.blocks; k++) {
            mbar_wait(empty(s), phase ^ 1);
            if (warp == 3) {
              mbar_arrive_expect_tx(full(s), t.absent ? 0 : kABytes);
              if (!t.absent) tma_load_3d(s_a + s * kABytes, &p.dh, full(s), k * 64, row, plane);
            } else {
              const uint32_t panel = s_b + s * kBBytes + warp * kPanelBytes;
              mbar_arrive_expect_tx(full(s), kPanelBytes);
              if (shared) {
                tma_load_3d_mc(panel + rank * (kPanelBytes / 2), &p.w1[plane], full(s), col, k * 64 + rank * 32, expert, 3);
              } else {
                tma_load_3d(panel, &p.w1[plane], full(s), col, k * 64, expert);
                tma_load_3d(panel + kPanelBytes / 2, &p.w1[plane], full(s), col, k * 64 + 32, expert);
              }
            }
            if (++s == kStages) {
              s = 0;
              phase ^= 1;
            }
          }
      }
    }
    __syncwarp();
    if (p.zero_rows) {
      const size_t begin = static_cast<size_t>(__ldg(p.rows)) * p.d / 8, end = static_cast<size_t>(p.R_cap) * p.d / 8;
      for (size_t i = begin + blockIdx.x * 128 + tid; i < end; i += gridDim.x * 128) reinterpret_cast<uint4*>(p.zero_rows)[i] = uint4{};
    }
  } else {
    reg_inc<232>();
    const int w = wg - 1, k_blocks = p.planes * p.blocks;
    auto release = [&](int s) {
      if (lane < 2) mbar_arrive_remote(empty(s), lane);
    };
    const uint32_t staging = s_staging + (w * 4 + warp) * kBuffers * kBoxBytes;
    int buffer = 0, used = 0;  // used: stages of the ring so far, those of the other warpgroup included
    float acc[2][kN / 2];
    if (w == 1) {
      at.advance(p.step);
      used = k_blocks;
      bar_arrive(3, 256);
    }  // warpgroup 0 starts
    for (;; at.advance(p.step), at.advance(p.step)) {
      const PairedTile t(at, p.step, tiles, rank);  // the other warpgroup computes meanwhile
      if (t.ended) break;
      const int row0 = t.row(), row_end = t.row_end();
      const bool any = !t.absent;
      bar_sync(3 + w, 256);  // my turn at the tensor cores
      int s = used % kStages, previous = -1;
      uint32_t phase = used / kStages & 1;
      used += 2 * k_blocks;
      auto mainloop = [&](auto width) {
        constexpr int N = decltype(width)::value;
        for (int k = 0; k < k_blocks; k++) {
          mbar_wait(full(s), phase);
          if (any) {
            wgmma_fence();
            const uint64_t a = desc_sw128(s_a + s * kABytes, 16, 1024), b = desc_sw128(s_b + s * kBBytes, kPanelBytes, 1024);
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
              for (int i = 0; i < 2; i++)
                Wgmma<N, 0, 1>::mma(*reinterpret_cast<float(*)[N / 2]>(&acc[i][0]), a + 2 * kk + 512 * i, b + 128 * kk, (k | kk) != 0);
            wgmma_commit();
          }
          wgmma_wait<1>();
          if (previous >= 0) release(previous);
          previous = s;
          if (++s == kStages) {
            s = 0;
            phase ^= 1;
          }
        }
      };
      const int columns = p.d - t.column * kN;  // a narrower last tile costs no more than its columns
      if (columns <= 64) mainloop(std::integral_constant<int, 64>());
      else if (columns <= 128) mainloop(std::integral_constant<int, 128>());
      else mainloop(std::integral_constant<int, kN>());
      bar_arrive(4 - w, 256);
      wgmma_wait<0>();
      release(previous);

#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = row0 + i * 64 + warp * 16, v = min(16, row_end - row);
        if (v <= 0 || !any) continue;
#pragma unroll
        for (int c = 0; c < kN / 64; c++) {
          if (c * 64 >= columns) break;
          if (lane == 0) bulk_wait_read<kBuffers - 1>();
          __syncwarp();
          const uint32_t buf = staging + buffer * kBoxBytes, srow = lane & 15;
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            const float* f = &acc[i][(c * 8 + j) * 4];
            stmatrix_x4(buf + srow * 128 + (((j + (lane >> 4)) ^ (srow & 7)) << 4), pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]),
                        pack(f[6], f[7]));
          }
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) {
            tma_store_4d(&p.dx, buf, t.column * kN + c * 64, kRaggedRows - v, row + v, 0);
            bulk_commit();
          }
          buffer = (buffer + 1) % kBuffers;
        }
      }
    }
    if (lane == 0) bulk_wait<0>();
  }
  cluster_sync();  // no CTA leaves while its peer may still arrive here
}

}  // namespace

void up_proj_bwd(const UpProjBwdArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.R_cap == 0) return;
  const uint64_t d = s.d, n = s.n, R = s.R_cap, E = s.E, planes = s.planes();
  const ConstWeight w1[2] = {s.act.gated() ? a.w1_gate : a.w1_up, a.w1_up};
  const WorkList work = work_list(a.routing.tiles, s.R_cap, s.E);
  UpProjBwdParams p{};
  p.dh = tensor_map<bf16>(a.dh, {n, R, planes}, {2 * planes * n, 2 * n}, {64, kM, 1}, 128);
  for (uint64_t i = 0; i < planes; i++)
    p.w1[i] = tensor_map<bf16>(w1[i].base, {d, n, E}, {2ull * w1[i].row_stride, 2ull * w1[i].expert_stride}, {64, 32, 1}, 128);
  p.dx = ragged_store_map(a.dx_rows, R, 1, d, 64);
  const int64_t columns = (s.d + kN - 1) / kN, pairs = (work_capacity(s.R_cap, s.E, kTileRows) + 1) / 2;
  const int clusters = static_cast<int>(std::min(int64_t{num_sms() / 2}, columns * pairs));
  p.step = WalkStep::make(&work.header->tiles, work.tiles, columns, clusters);
  p.d = static_cast<int>(d);
  p.planes = static_cast<int>(planes);
  p.blocks = static_cast<int>((n + 63) / 64);
  if (s.kind == RoutingKind::Rows) {
    p.zero_rows = static_cast<bf16*>(a.dx_rows);
    p.rows = &work.header->rows;
    p.R_cap = static_cast<int>(R);
  }
  launch_kernel(up_proj_bwd_kernel, 2 * clusters, kSmem, stream, p);
}

}  // namespace machmoe::cuda::hopper
