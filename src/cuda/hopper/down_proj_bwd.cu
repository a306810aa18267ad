// dH kernel: dA' = gather(dO) W2, and in the epilogue A = act(H), dS = <dA', A>, dH = act'(H) s dA', A' = s A.
// Ping-pong: each consumer warpgroup owns a 64 x 256 tile and computes while the other runs its epilogue. The CTAs of a cluster take two row tiles
// of one expert and multicast half of W2 each (MN-major panels [64 of d][64 of n]); dO rows are gathered by cp.async.
// Epilogue per warp, 16 rows x 32 columns at a time: H arrives by TMA while the mainloop runs, dH overwrites it in place, A' stands beside it, both
// leave by ragged TMA stores. Warp i of both warpgroups uses the same buffers: the one that ends its epilogue loads the first chunks for the other.
#include <type_traits>

#include "core/activation.h"
#include "cuda/hopper/gemm/launch.cuh"
#include "cuda/hopper/gemm/tile_walk.cuh"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/hopper/select.h"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

constexpr int kM = 64, kN = 256;
constexpr int kABytes = kM * 128, kPanelBytes = 64 * 128, kBBytes = kN / 64 * kPanelBytes;
constexpr int kChunk = 32, kPlaneBytes = 16 * kChunk * 2, kBufferBytes = 3 * kPlaneBytes;  // a buffer holds gate, up and A' of 16 rows

// Shared memory goes to stages of the mainloop or to buffers of the epilogue: a short mainloop (small d) leaves the time to the epilogue.
template <int kStages_, int kBuffers_>
struct Split {
  static constexpr int kStages = kStages_, kBuffers = kBuffers_, kStaging = 4 * kBuffers * kBufferBytes;
  static constexpr int kSmem = kStages * (kABytes + kBBytes) + kStaging + 2 * kStages * 8 + 4 * kBuffers * 8;
  static_assert(kSmem <= 232448);
};
using LongMainloop = Split<5, 2>;
using ShortMainloop = Split<4, 5>;

struct DownProjBwdParams {
  CUtensorMap w2;       // [E][d][n], box {64, 64, 1}
  CUtensorMap h;        // [planes][R_cap][n], box {32, 16, planes}
  CUtensorMap dh;       // ragged, box {32, 16, 1, planes}
  CUtensorMap a_prime;  // ragged, box {32, 16, 1}
  WalkStep step;
  const bf16* d_o;     // [T, d]
  const int* token;    // row -> row of d_o; null: itself
  const float* score;  // null: 1
  float* ds;           // [column tiles][R_cap]
  int d, n, R_cap;
  float alpha, limit;
};

// kClamped: SwiGLU and swiglu_oai with a limit. The common case carries no code for it.
template <ActivationKind K, bool kClamped, class Split>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) down_proj_bwd_kernel(const __grid_constant__ DownProjBwdParams p) {
  constexpr int kPlanes = Activation{K}.gated() ? 2 : 1, kStages = Split::kStages, kBuffers = Split::kBuffers, kStaging = Split::kStaging;
  constexpr int kTogether = K == ActivationKind::SwiGLU && !kClamped ? 2 : 1;  // 16-column halves of a chunk in registers at a time
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t s_a = smem_u32(raw), s_b = s_a + kStages * kABytes, s_staging = s_b + kStages * kBBytes, bars = s_staging + kStaging;
  auto full = [&](int s) { return bars + 8 * s; };
  auto empty = [&](int s) { return bars + 8 * (kStages + s); };
  auto loaded = [&](int warp, int b) { return bars + 16 * kStages + 8 * (warp * kBuffers + b); };  // H stands in buffer b of the warp
  const int wg = threadIdx.x / 128, tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32, rank = cluster_ctarank();
  const int blocks = (p.d + 63) / 64;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      mbar_init(full(s), 129);
      mbar_init(empty(s), 4 * 2);
    }
    for (int i = 0; i < 4 * kBuffers; i++) mbar_init(loaded(0, i), 1);
    mbar_init_fence();
  }
  cluster_sync();
  const int entries = __ldg(p.step.entries);
  TileWalk at(p.step, blockIdx.x / 2);

  if (wg == 0) {
    reg_dec<56>();
    constexpr int kRows = kM / 16;  // this thread copies 16-byte chunk tid % 8 of the rows tid / 8 + 16 i
    const uint32_t dst0 = s_a + (tid / 8) * 128 + (((tid % 8) ^ ((tid / 8) & 7)) << 4);
    int source[kRows];  // rows of d_o; past the expert's end its last row, which the store clips
    auto fetch = [&](const OutputTile& t) {
      if (!t.valid()) return;
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int row = min(t.row + rank * kM + tid / 8 + 16 * i, t.row_end - 1);
        source[i] = p.token ? __ldg(p.token + row) : row;
      }
    };
    int s = 0;
    uint32_t phase = 0;
    // Tiles are read two ahead and their rows one ahead, so that nothing here waits for a load.
    OutputTile next = tile_at(at, p.step, entries);
    fetch(next);
    at.advance(p.step);
    OutputTile after = tile_at(at, p.step, entries);
    while (next.valid()) {
      const OutputTile t = next;
      const bool any = t.row + rank * kM < t.row_end;
      const uint8_t* src[kRows];
#pragma unroll
      for (int i = 0; i < kRows; i++) src[i] = reinterpret_cast<const uint8_t*>(p.d_o) + static_cast<size_t>(source[i]) * (2 * p.d) + (tid % 8) * 16;
      next = after;
      fetch(next);
      at.advance(p.step);
      after = tile_at(at, p.step, entries);
      for (int k = 0; k < blocks; k++) {
        mbar_wait(empty(s), phase ^ 1);
        if (tid == 0) {
          mbar_arrive_expect_tx(full(s), kBBytes);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int j = 2 * rank + i;
            tma_load_3d_mc(s_b + s * kBBytes + j * kPanelBytes, &p.w2, full(s), t.column * kN + j * 64, k * 64, t.expert, 3);
          }
        }
        if (any) {
          const int bytes = k * 64 + (tid % 8) * 8 < p.d ? 16 : 0;  // columns past d are zero
#pragma unroll
          for (int i = 0; i < kRows; i++) {
            cp_async16_zfill(dst0 + s * kABytes + i * 2048, src[i], bytes);
            src[i] += 128;
          }
        }
        cp_async_mbar_arrive_noinc(full(s));
        if (++s == kStages) {
          s = 0;
          phase ^= 1;
        }
      }
    }
  } else {
    reg_inc<224>();
    const int w = wg - 1;
    auto release = [&](int s) {
      if (lane < 2) mbar_arrive_remote(empty(s), lane);
    };
    auto buffer_at = [&](int b) { return s_staging + (warp * kBuffers + b) * kBufferBytes; };
    auto first_row = [&](const OutputTile& t) { return t.row + rank * kM + warp * 16; };  // of this warp
    auto chunks = [&](const OutputTile& t) { return first_row(t) < t.row_end ? (min(kN, p.n - t.column * kN) + kChunk - 1) / kChunk : 0; };
    auto load_h = [&](const OutputTile& t, int chunk, int b) {  // one lane
      mbar_arrive_expect_tx(loaded(warp, b), kPlanes * kPlaneBytes);
      tma_load_3d(buffer_at(b), &p.h, loaded(warp, b), t.column * kN + chunk * kChunk, first_row(t), 0);
    };
    int buffer = 0;         // of the next chunk; the pair of warps counts through the tiles of both
    uint32_t parities = 0;  // bit b: the phase of buffer b that comes next
    auto preload = [&](const OutputTile& t) {
      if (lane == 0) {
        for (int c = 0; c < min(chunks(t), kBuffers); c++) load_h(t, c, (buffer + c) % kBuffers);
      }
      __syncwarp();
    };
    auto skip = [&](const OutputTile& t) {
      for (int c = chunks(t); c > 0; c--) {
        parities ^= 1u << buffer;
        buffer = (buffer + 1) % kBuffers;
      }
    };

    float acc[kN / 2];
    int used = 0;  // stages of the ring so far, those of the other warpgroup included
    OutputTile next = tile_at(at, p.step, entries);
    if (w == 0) {
      if (next.valid()) preload(next);
    } else {
      if (next.valid()) skip(next);
      used = blocks;
      at.advance(p.step);
      next = tile_at(at, p.step, entries);
      bar_arrive(3, 256);        // warpgroup 0 starts
      bar_arrive(6 + warp, 64);  // and owns the buffers
    }
    while (next.valid()) {
      const OutputTile t = next;
      at.advance(p.step);
      const OutputTile peer = tile_at(at, p.step, entries);  // of the other warpgroup
      at.advance(p.step);
      next = tile_at(at, p.step, entries);
      const int row = first_row(t), v = min(16, t.row_end - row), count = chunks(t);
      const bool any = t.row + rank * kM < t.row_end;
      float score[2];
#pragma unroll
      for (int h = 0; h < 2; h++) score[h] = p.score ? __ldg(p.score + min(row + lane / 4 + 8 * h, p.R_cap - 1)) : 1.f;

      bar_sync(3 + w, 256);  // my turn at the tensor cores
      int s = used % kStages, previous = -1;
      uint32_t phase = used / kStages & 1;
      used += 2 * blocks;
      auto mainloop = [&](auto width) {
        constexpr int N = decltype(width)::value;
        for (int k = 0; k < blocks; k++) {
          mbar_wait(full(s), phase);
          fence_proxy_async();
          if (any) {
            wgmma_fence();
            const uint64_t a = desc_sw128(s_a + s * kABytes, 16, 1024), b = desc_sw128(s_b + s * kBBytes, kPanelBytes, 1024);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) Wgmma<N, 0, 1>::mma(*reinterpret_cast<float(*)[N / 2]>(&acc[0]), a + 2 * kk, b + 128 * kk, (k | kk) != 0);
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
      const int columns = p.n - t.column * kN;  // a narrower last tile costs no more than its columns
      if (columns <= 64) mainloop(std::integral_constant<int, 64>());
      else if (columns <= 128) mainloop(std::integral_constant<int, 128>());
      else if (columns <= 192) mainloop(std::integral_constant<int, 192>());
      else mainloop(std::integral_constant<int, kN>());
      bar_arrive(4 - w, 256);
      wgmma_wait<0>();
      release(previous);

      bar_sync(6 + w * 4 + warp, 64);  // the other warp is done with the buffers: parities would be ambiguous otherwise
      const int peer_count = peer.valid() ? chunks(peer) : 0;
      auto load_ahead = [&](int c, int b) {  // the chunk that follows c in its buffer: of this tile, or one of the peer's first
        const int ahead = c + kBuffers;
        if (ahead < count) load_h(t, ahead, b);
        else if (ahead - count < min(peer_count, kBuffers)) load_h(peer, ahead - count, b);
      };
      if (lane == 0)
        for (int c = count - kBuffers; c < 0; c++)
          load_ahead(c, (buffer + kBuffers + c) % kBuffers);  // few chunks: buffers that this tile leaves free
      float ds[2] = {0.f, 0.f};
#pragma unroll
      for (int c = 0; c < kN / kChunk; c++) {
        if (c >= count) break;
        const uint32_t buf = buffer_at(buffer);
        mbar_wait(loaded(warp, buffer), parities >> buffer & 1);
        parities ^= 1u << buffer;
        // H first and the stores last: the chains in between are independent and hide each other's latency.
#pragma unroll
        for (int j0 = 0; j0 < kChunk / 16; j0 += kTogether) {
          uint32_t gate[kTogether][4], up[kTogether][4], a_prime[kTogether][4];
#pragma unroll
          for (int j = 0; j < kTogether; j++) {
            const uint32_t at_j = buf + matrix_offset<kChunk>(lane, 2 * (j0 + j));
            if constexpr (kPlanes == 2) ldmatrix_x4(gate[j], at_j);
            ldmatrix_x4(up[j], at_j + (kPlanes - 1) * kPlaneBytes);
          }
#pragma unroll
          for (int j = 0; j < kTogether; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {  // fragment i: column block 2 (j0 + j) + i / 2, row half i % 2
              const int h = i & 1;
              const float2 g = kPlanes == 2 ? unpack(gate[j][i]) : float2{}, u = unpack(up[j][i]);
              float d_gate[2], d_up[2], scaled[2];
#pragma unroll
              for (int e = 0; e < 2; e++) {
                const float da = acc[(c * (kChunk / 8) + 2 * (j0 + j) + (i >> 1)) * 4 + h * 2 + e], sda = score[h] * da;
                const ActivationGrad<float> act = activate<K, float>(e ? g.y : g.x, e ? u.y : u.x, p.alpha, kClamped ? p.limit : 0.f);
                ds[h] = fmaf(da, act.a, ds[h]);
                d_gate[e] = sda * act.d_gate;
                d_up[e] = sda * act.d_up;
                scaled[e] = score[h] * act.a;
              }
              if constexpr (kPlanes == 2) gate[j][i] = pack(d_gate[0], d_gate[1]);
              up[j][i] = pack(d_up[0], d_up[1]);
              a_prime[j][i] = pack(scaled[0], scaled[1]);
            }
#pragma unroll
          for (int j = 0; j < kTogether; j++) {
            const uint32_t at_j = buf + matrix_offset<kChunk>(lane, 2 * (j0 + j));
            if constexpr (kPlanes == 2) stmatrix_x4(at_j, gate[j][0], gate[j][1], gate[j][2], gate[j][3]);
            stmatrix_x4(at_j + (kPlanes - 1) * kPlaneBytes, up[j][0], up[j][1], up[j][2], up[j][3]);
            stmatrix_x4(at_j + 2 * kPlaneBytes, a_prime[j][0], a_prime[j][1], a_prime[j][2], a_prime[j][3]);
          }
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
          const int col = t.column * kN + c * kChunk;
          tma_store_4d(&p.dh, buf, col, 16 - v, row + v, 0);
          tma_store_4d(&p.a_prime, buf + 2 * kPlaneBytes, col, kRaggedRows - v, row + v, 0);
          bulk_commit();
          if (c > 0) {  // H into the buffer of the previous chunk, whose store has been read by now
            bulk_wait_read<1>();
            load_ahead(c - 1, (buffer + kBuffers - 1) % kBuffers);
          }
        }
        __syncwarp();
        buffer = (buffer + 1) % kBuffers;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        ds[h] += __shfl_xor_sync(~0u, ds[h], 1);
        ds[h] += __shfl_xor_sync(~0u, ds[h], 2);
        if (lane % 4 == 0 && lane / 4 + 8 * h < v) p.ds[static_cast<size_t>(t.column) * p.R_cap + row + lane / 4 + 8 * h] = ds[h];
      }
      if (lane == 0) {
        bulk_wait_read<0>();
        if (count > 0) load_ahead(count - 1, (buffer + kBuffers - 1) % kBuffers);
      }
      __syncwarp();
      if (peer.valid()) skip(peer);
      bar_arrive(6 + (1 - w) * 4 + warp, 64);  // the buffers are the other warp's
    }
    if (lane == 0) bulk_wait<0>();
  }
  cluster_sync();  // no CTA leaves while its peer may still arrive here
}

// dS += <dO, b2>, into the first partial. One warp a row; only layers with an output bias run it.
__global__ void __launch_bounds__(256) score_bias_kernel(const WorkHeader* header, const WorkTile* tiles, const bf16* d_o, const int* token,
                                                         const bf16* b2, int64_t stride, int64_t expert_stride, int d, float* ds) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = blockIdx.x; i < header->tiles; i += gridDim.x) {
    const WorkTile t = tiles[i];
    const bf16* bias = b2 + t.expert * expert_stride;
    for (int row = t.row + warp; row < min(t.row + kTileRows, t.row_end); row += 8) {
      const bf16* x = d_o + static_cast<size_t>(token ? token[row] : row) * d;
      float sum = 0.f;
      for (int c = lane * 8; c < d; c += 256) {
        const uint4 q = *reinterpret_cast<const uint4*>(x + c);
        const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 f = unpack(words[j]);
          sum = fmaf(f.x, __bfloat162float(bias[(c + 2 * j) * stride]), sum);
          sum = fmaf(f.y, __bfloat162float(bias[(c + 2 * j + 1) * stride]), sum);
        }
      }
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == 0) ds[row] += sum;
    }
  }
}

}  // namespace

int64_t ds_parts(const Shape& s) { return (s.n + kN - 1) / kN; }

void down_proj_bwd(const DownProjBwdArgs& a, Stream stream) {
  const Shape& s = a.shape;
  if (s.R_cap == 0) return;
  const uint64_t d = s.d, n = s.n, R = s.R_cap, E = s.E, planes = s.planes(), pitch = 2 * planes * n;
  const WorkList work = work_list(a.routing.tiles, s.R_cap, s.E);
  DownProjBwdParams p{};
  p.w2 = tensor_map<bf16>(a.w2.base, {n, d, E}, {2ull * a.w2.row_stride, 2ull * a.w2.expert_stride}, {64, 64, 1}, 128);
  p.h = tensor_map<bf16>(a.h, {n, R, planes}, {pitch, 2 * n}, {kChunk, 16, static_cast<uint32_t>(planes)}, 2 * kChunk);
  p.dh = tensor_map<bf16>(static_cast<const uint8_t*>(a.dh) - 16 * pitch, {n, 16, R + 1, planes}, {pitch, pitch, 2 * n},
                          {kChunk, 16, 1, static_cast<uint32_t>(planes)}, 2 * kChunk);
  p.a_prime = ragged_store_map(a.a_prime, R, 1, n, kChunk);
  const int64_t columns = ds_parts(s);
  const int clusters = static_cast<int>(std::min(int64_t{num_sms() / 2}, columns * work_capacity(s.R_cap, s.E, kTileRows)));
  p.step = WalkStep::make(&work.header->tiles, work.tiles, columns, clusters);
  p.d_o = static_cast<const bf16*>(a.d_o);
  p.token = a.routing.token;
  p.score = static_cast<const float*>(a.routing.score);
  p.ds = static_cast<float*>(a.ds_parts);
  p.d = static_cast<int>(d);
  p.n = static_cast<int>(n);
  p.R_cap = static_cast<int>(R);
  p.alpha = s.act.alpha;
  p.limit = s.act.limit;
  dispatch_activation(s.act.kind, [&](auto tag) {
    constexpr ActivationKind kKind = decltype(tag)::kind;
    auto launch = [&](auto clamped, auto split) {
      using Chosen = decltype(split);
      launch_kernel(down_proj_bwd_kernel<kKind, decltype(clamped)::value, Chosen>, 2 * clusters, Chosen::kSmem, stream, p);
    };
    if constexpr (kKind == ActivationKind::SwiGLU || kKind == ActivationKind::SwiGLUOai) {
      if (s.act.limit > 0) return launch(std::true_type(), LongMainloop());
    }
    if constexpr (kKind == ActivationKind::SwiGLU) {
      if (short_mainloop(s)) return launch(std::false_type(), ShortMainloop());
    }
    launch(std::false_type(), LongMainloop());
  });
  if (a.b2.base) {
    const int grid = static_cast<int>(std::min(int64_t{4 * num_sms()}, work_capacity(s.R_cap, s.E, kTileRows)));
    score_bias_kernel<<<grid, 256, 0, stream_of(stream)>>>(work.header, work.tiles, p.d_o, p.token, static_cast<const bf16*>(a.b2.base), a.b2.stride,
                                                           a.b2.expert_stride, p.d, p.ds);
    MACHMOE_CUDA_CALL(cudaGetLastError());
  }
}

}  // namespace machmoe::cuda::hopper
