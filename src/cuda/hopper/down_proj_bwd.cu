// dH kernel: dA' = gather(dO) W2, and in the epilogue A = act(H), dS = <dA', A>, dH = act'(H) s dA', A' = s A.
// A finished tile of dA' is held as bf16 while the next one is multiplied. Epilogue per warp, 8 rows x 64 columns at a time, whole lines of memory: H
// arrives by TMA while products run, dH overwrites it in place, A' stands beside it, both leave by ragged TMA stores.
#include <type_traits>

#include "core/activation.h"
#include "cuda/gather.cuh"
#include "cuda/hopper/gemm/grouped_gemm.cuh"
#include "cuda/hopper/gemm/held_tiles.cuh"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"
#include "cuda/kernels.h"

namespace machmoe::cuda::hopper {
namespace {

constexpr int kN = 256;

// kClamped: SwiGLU and swiglu_oai with a limit. The common case carries no code for it.
template <ActivationKind K, bool kClamped>
struct ActivationGradEpilogue {
  static constexpr bool kNarrow = true;
  static constexpr int kPlanes = Activation{K}.gated() ? 2 : 1;
  static constexpr int kColumns = 64, kRows = 8, kChunks = kN / kColumns * 2;  // of a chunk: the low, then the high rows of the fragments
  static constexpr int kPlaneBytes = kRows * kColumns * 2, kStagingBytes = 3 * kPlaneBytes;  // gate, up and A'
  static constexpr int kNoteBytes = HeldTiles::kBytes + 2 * 64 + 16;                         // tiles, the scores (before: slots) of two, a barrier
  struct Params {
    CUtensorMap h;            // [planes][R_cap][n], box {64, 8, planes}
    CUtensorMap dh, a_prime;  // ragged_map of [R_cap, planes, n] and [R_cap, 1, n], 8 rows and all planes a box
    const int* slot;          // TopK: row -> place of its score; else null: the row
    const float* score;       // null: 1
    float* ds;                // [column tiles][R_cap]
    int n, R_cap;
    float alpha, limit;
  };
  const Params& p;
  uint32_t staging, notes;  // shared memory of this warp
  HeldTiles tiles;
  int left = 0, following = 0;  // chunks of the held tile to come, those of the next one
  int loads = 0;                // of H so far
  bool loading = false;         // H of the next chunk is under way, or there
  float ds[2] = {0.f, 0.f};

  DEV uint32_t score_at(uint32_t tile, int row) const { return notes + HeldTiles::kBytes + 4 * (tile + row); }
  DEV uint32_t loaded() const { return notes + HeldTiles::kBytes + 128; }
  DEV int chunks(int rows, int column) const { return rows > 0 ? (min(kN, p.n - column * kN) + kColumns - 1) / kColumns * 2 : 0; }

  DEV ActivationGradEpilogue(const Params& params, uint32_t staging_, uint32_t notes_) : p(params), staging(staging_), notes(notes_), tiles(notes_) {
    if (lane_id() == 0) {
      mbar_init(loaded(), 1);
      mbar_init_fence();
      fence_proxy_async();
    }
    __syncwarp();
  }
  DEV int columns(const CtaTile& t) const { return p.n - t.column * kN; }
  // A tile begins to be multiplied. Its scores are on their way, of top-K their slots.
  DEV void begin(const CtaTile& t, int row) {
    tiles.begin(t, row);
    const int rows = min(16, t.row_end - row), lane = lane_id();
    following = chunks(rows, t.column);
    if (lane < rows) {
      const uint32_t score = score_at(tiles.next, lane);
      if (p.slot) cp_async4(score, p.slot + row + lane);
      else if (p.score) cp_async4(score, p.score + row + lane);
      else store_shared(score, 1.f);
    }
    __syncwarp();
  }
  // H of the next chunk, once the stores of the last one have been read.
  DEV void refill() {
    if (loading || left + following == 0) return;
    if (lane_id() == 0) {
      const WarpTile t = tiles.at(left > 0 ? tiles.next ^ 16 : tiles.next);
      const int c = left > 0 ? chunks(t.rows, t.column) - left : 0;
      bulk_wait_read<0>();
      mbar_arrive_expect_tx(loaded(), kPlanes * kPlaneBytes);
      tma_load_3d(staging, &p.h, loaded(), t.column * kN + c / 2 * kColumns, t.row + c % 2 * kRows, 0);
    }
    __syncwarp();
    loading = true;
    loads++;
  }
  // The tile is complete: its products are what chunk() sees from now on. The scores of top-K arrive by the first chunk, in the place of the slots.
  DEV bool complete(const float (&)[kN / 2]) {
    finish_ds();
    left = following;
    following = 0;
    ds[0] = ds[1] = 0.f;
    const WarpTile t = tiles.complete();
    if (p.slot) {
      cp_async_wait_all();
      const uint32_t score = score_at(tiles.next ^ 16, lane_id());
      if (lane_id() < t.rows) cp_async4(score, p.score + load_shared_int(score));
    }
    return t.more;
  }
  // held: dA' in pairs; A' takes its place.
  DEV void chunk(int c, uint32_t (&held)[kN / 4]) {
    if (left == 0) return;
    const int half = c % 2, lane = lane_id();
    if (c == 0) {
      cp_async_wait_all();
      __syncwarp();
    }
    mbar_wait(loaded(), ~loads & 1);
    const float score = load_shared_float(score_at(tiles.next ^ 16, lane / 4 + kRows * half));
    // Two blocks of 8 columns at a time, of both planes: a lane holds a pair of each.
    auto at = [&](int q) { return staging + (kPlanes == 2 ? lane / 16 * kPlaneBytes : 0) + swizzled(lane % 8, 2 * q + lane / 8 % 2); };
    uint32_t ahead[4];
    auto read = [&](int q) {
      if constexpr (kPlanes == 2) ldmatrix_x4(ahead, at(q));
      else ldmatrix_x2(ahead[2], ahead[3], at(q));
    };
    read(0);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      uint32_t h[4];
#pragma unroll
      for (int i = 0; i < 4; i++) h[i] = ahead[i];
      if (q < 3) read(q + 1);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t& a_prime = held[(c / 2 * 8 + 2 * q + i) * 2 + half];
        const float2 g = kPlanes == 2 ? unpack(h[i]) : float2{}, u = unpack(h[2 + i]), da = unpack_here(a_prime);
        float d_gate[2], d_up[2], scaled[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float d = e ? da.y : da.x, sd = score * d;
          const ActivationGrad<float> act = activate<K, float>(e ? g.y : g.x, e ? u.y : u.x, p.alpha, kClamped ? p.limit : 0.f);
          ds[half] = fmaf(d, act.a, ds[half]);
          d_gate[e] = sd * act.d_gate;
          d_up[e] = sd * act.d_up;
          scaled[e] = score * act.a;
        }
        h[i] = pack(d_gate[0], d_gate[1]);
        h[2 + i] = pack(d_up[0], d_up[1]);
        a_prime = pack(scaled[0], scaled[1]);
      }
      if constexpr (kPlanes == 2) stmatrix_x4(at(q), h[0], h[1], h[2], h[3]);
      else stmatrix_x2(at(q), h[2], h[3]);
      if (q % 2 == 1) {
        const uint32_t* a_prime = held + (c / 2 * 8 + 2 * q - 2) * 2 + half;
        stmatrix_x4(staging + 2 * kPlaneBytes + swizzled(lane % 8, 2 * q - 2 + lane / 8), a_prime[0], a_prime[2], a_prime[4], a_prime[6]);
      }
    }
    fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) {
      const WarpTile t = tiles.held();
      const int column = t.column * kN + c / 2 * kColumns, row = t.row + kRows * half, v = min(kRows, t.rows - kRows * half);
      if (v > 0) {
        tma_store_4d(&p.dh, staging, column, kRows - v, row + v, 0);
        tma_store_4d(&p.a_prime, staging + 2 * kPlaneBytes, column, kRows - v, row + v, 0);
        bulk_commit();
      }
    }
    left--;
    loading = false;
  }
  DEV void finish() {
    if (lane_id() == 0) bulk_wait<0>();
  }

 private:
  DEV void finish_ds() {
    const WarpTile t = tiles.held();
    const int lane = lane_id();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      ds[h] += __shfl_xor_sync(~0u, ds[h], 1);
      ds[h] += __shfl_xor_sync(~0u, ds[h], 2);
      if (lane % 4 == 0 && lane / 4 + 8 * h < t.rows) p.ds[static_cast<size_t>(t.column) * p.R_cap + t.row + lane / 4 + 8 * h] = ds[h];
    }
  }
};

// dS += <dO, b2>, into the first partial. One warp a row; only layers with an output bias run it.
__global__ void __launch_bounds__(256) score_bias_kernel(const WorkHeader* header, const WorkTile* tiles, const bf16* d_o, Gather source,
                                                         const bf16* b2, int64_t stride, int64_t expert_stride, int d, float* ds) {
  cudaGridDependencySynchronize();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = blockIdx.x; i < header->tiles; i += gridDim.x) {
    const WorkTile t = tiles[i];
    const bf16* bias = b2 + t.expert * expert_stride;
    for (int row = t.row + warp; row < min(t.row + kTileRows, t.row_end); row += 8) {
      const bf16* x = d_o + static_cast<size_t>(source[row]) * d;
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
  check_aligned(a.d_o, "d_o");
  const uint64_t d = s.d, n = s.n, R = s.R_cap, E = s.E, planes = s.planes(), pitch = 2 * planes * n;
  const int64_t columns = ds_parts(s);
  const Gather source(row_source(s, a.routing));
  dispatch_activation(s.act.kind, [&](auto tag) {
    constexpr ActivationKind kKind = decltype(tag)::kind;
    auto launch = [&](auto clamped) {
      using Epilogue = ActivationGradEpilogue<kKind, decltype(clamped)::value>;
      using Schedule = Held<kN, 4>;
      GroupedGemmParams<GatherRows, Epilogue, WeightPanels> p{};
      p.k_blocks = static_cast<int>((s.d + kBlockK - 1) / kBlockK);
      p.rows = {static_cast<const uint4*>(a.d_o), source, static_cast<int>(s.d / 8)};
      p.weights.plane[0] = tensor_map<bf16>(a.w2.base, {n, d, E}, {2ull * a.w2.row_stride, 2ull * a.w2.expert_stride}, {64, kBlockK, 1}, 128);
      p.weights.blocks = p.k_blocks;
      auto& e = p.epilogue;
      const auto boxed = static_cast<uint32_t>(planes);
      e.h = tensor_map<bf16>(a.h, {n, R, planes}, {pitch, 2 * n}, {Epilogue::kColumns, Epilogue::kRows, boxed}, 128);
      e.dh = ragged_map(a.dh, R, planes, n, {Epilogue::kColumns, Epilogue::kRows, boxed});
      e.a_prime = ragged_map(a.a_prime, R, 1, n, {Epilogue::kColumns, Epilogue::kRows, 1});
      e.slot = a.routing.slot;
      e.score = static_cast<const float*>(a.routing.score);
      e.ds = static_cast<float*>(a.ds_parts);
      e.n = static_cast<int>(n);
      e.R_cap = static_cast<int>(R);
      e.alpha = s.act.alpha;
      e.limit = s.act.limit;
      launch_grouped_gemm<Schedule>(p, s, a.routing, columns, a.turns, stream);
    };
    if constexpr (kKind == ActivationKind::SwiGLU || kKind == ActivationKind::SwiGLUOai) {
      if (s.act.limit > 0) return launch(std::true_type());
    }
    launch(std::false_type());
  });
  if (a.b2.base) {
    const WorkList work = work_list(a.routing.tiles, s.E);
    const int grid = static_cast<int>(std::min(int64_t{4 * num_sms()}, work_capacity(s.R_cap, s.E)));
    launch_kernel(score_bias_kernel, grid, 256, 0, stream, work.header, work.tiles, static_cast<const bf16*>(a.d_o), source,
                  static_cast<const bf16*>(a.b2.base), a.b2.stride, a.b2.expert_stride, static_cast<int>(d), static_cast<float*>(a.ds_parts));
  }
}

}  // namespace machmoe::cuda::hopper
