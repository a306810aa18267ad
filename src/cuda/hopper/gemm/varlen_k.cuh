// The grouped GEMM of the weight gradients: the rows of an expert are the reduction.
//   P_e = G_e^T C_e,  G = rows of X or dO gathered by token [T, d],  C = contiguous rows of dH or A' [R_cap, planes, n]
// A tile is 128 gathered columns (the M side of wgmma) x 4 or 3 panels of 64 contiguous columns (the N side); panels are numbered through the planes.
// Two CTAs of a cluster take neighbouring gathered columns of the same panels and multicast half of them each.
//   warpgroup 0      gathers G by cp.async and loads C by ragged TMA; rows past the expert's end are zero
//   warpgroups 1, 2  64 x 256 accumulators each, then a plain (dW2) or a transposed (dW1) store, beside the next tile's first blocks
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/gather.cuh"
#include "cuda/hopper/gemm/multiply.cuh"
#include "cuda/hopper/gemm/ring.cuh"
#include "cuda/hopper/gemm/turns.cuh"
#include "cuda/hopper/tile/fragment.cuh"
#include "cuda/hopper/tile/tensor_map.h"
#include "cuda/launch.h"
#include "ops.h"

namespace machmoe::cuda::hopper {

// Where a store goes: P transposed (rows = contiguous columns) or as it is, in bf16 or fp32. One box of 64 x 64 bf16 for a warpgroup, else 2 KB a warp.
template <class Out, bool kTransposed>
struct GradStore {
  static constexpr bool kBf16 = std::is_same_v<Out, bf16>;
  static constexpr bool kByWarpgroup = kBf16 && kTransposed;
  static constexpr int kColumns = kBf16 ? 64 : 32;  // accumulator columns a box holds
  static constexpr int kBytes = kByWarpgroup ? 8192 : 2048;
  static constexpr int kBoxInner = kTransposed ? (kBf16 ? 64 : 16) : kColumns;  // elements along a row of the weight
  static constexpr int kBoxOuter = kTransposed ? kColumns : 16;
  static constexpr int kSwizzle = kBoxInner * static_cast<int>(sizeof(Out));

  static constexpr int kFragment = 16;  // registers of a box: 32 bf16 in pairs, or 16 fp32
  // f: the fragment of kColumns columns, bf16 in pairs; the staging box as shared-memory address and as pointer.
  template <class F>
  DEV static void stage(uint32_t buf, uint8_t* p, const F* f, int warp, int lane) {
    if constexpr (kBf16) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t r0 = f[2 * j], r1 = f[2 * j + 1], r2 = f[2 * j + 2], r3 = f[2 * j + 3];
        if constexpr (kTransposed) {  // matrices: (rows low, block j), (high, j), (low, j + 1), (high, j + 1)
          const int row = (j + (lane >> 4)) * 8 + (lane & 7), chunk = warp * 2 + ((lane >> 3) & 1);
          stmatrix_x4_trans(buf + swizzled(row, chunk), r0, r1, r2, r3);
        } else {
          stmatrix_x4(buf + matrix_offset(lane, j), r0, r1, r2, r3);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = lane / 4 + 8 * h, col = 8 * j + 2 * (lane % 4);
          if constexpr (kTransposed) {
#pragma unroll
            for (int e = 0; e < 2; e++)
              *reinterpret_cast<float*>(p + (col + e) * 64 + ((row >> 2) ^ (((col + e) >> 1) & 3)) * 16 + (row & 3) * 4) = f[4 * j + 2 * h + e];
          } else {
            *reinterpret_cast<float2*>(p + swizzled(row, col >> 2) + (col & 3) * 4) = {f[4 * j + 2 * h], f[4 * j + 2 * h + 1]};
          }
        }
    }
  }
};

struct VarlenKParams {
  ExpertTurns turns;
  CUtensorMap contiguous;  // ragged panels, box {64, 64, 1, 1}
  CUtensorMap out[2];      // one per plane
  const bf16* gathered;    // [T, d]
  Gather source;           // row -> row of gathered
  int experts, d;
  int panels_per_plane, panels;
  int columns;  // (of panels) of a group of 2 x 128 gathered columns; innermost: they share the gathered rows
  int wide;     // columns before this one have 4 panels, the others 3 (the last one what is left)
  bool accumulate;
};

// As the producers see a tile: an expert's rows and one of its tiles, in groups of p.columns.
struct ExpertTile {
  int expert, row, row_end, tile;
  bool valid;
  DEV int blocks() const { return (row_end - row + 63) >> 6; }
};

// The tile at a place, its words spread over the lanes of a warp as in SpreadTile: lane l holds word l % 4 of the list's entry.
struct SpreadExpert {
  int word = 0, tile = 0;
  bool valid = false;

  DEV SpreadExpert(const WorkExpert* list, const TilePlace& place) {
    if (place.pair < 0) return;
    word = __ldg(reinterpret_cast<const int*>(list + place.pair) + lane_id() % 4);
    tile = place.column;
    valid = true;
  }
  DEV ExpertTile gather() const {
    const auto at = [&](int lane) { return __shfl_sync(~0u, word, lane); };
    return {at(0), at(1), at(2), tile, valid};
  }
};

// The panels of a column.
struct PanelRange {
  int first, count;
  DEV PanelRange(const VarlenKParams& p, int column)
      : first(column * 4 - max(0, column - p.wide)), count(min(column < p.wide ? 4 : 3, p.panels - first)) {}
};

// As the consumers see it; they find it in shared memory beside its first stage. blocks: of 64 rows, 0 for an expert without rows.
struct OutputTile {
  int expert, blocks, group, panel, panels;
  bool more;

  DEV int4 packed() const { return {expert << 1 | more, blocks, group, panel << 3 | panels}; }
  DEV static OutputTile of(int4 t) { return {t.x >> 1, t.y, t.z, t.w >> 3, t.w & 7, (t.x & 1) != 0}; }
};

// What a tile writes: columns of its panels from `panel` on; 0: nothing.
struct OutputBlock {
  int expert, group, panel, columns;
};

// Shared memory: the ring's stages, with G as two panels and C as four; what the consumers stage for the copy engine; the ring's control;
// the turns.
struct VarlenKLayout {
  using R = Ring<256, 4>;
  static constexpr int kBuffers = 2;  // boxes a storer stages at a time
  static constexpr int kStaging = R::kBytes, kControl = kStaging + 8 * 2048 * kBuffers, kTurns = kControl + R::kControlBytes,
                       kBytes = kTurns + TurnSlots::kBytes;
  static_assert(kBytes <= kMaxSharedBytes && R::kStages + 4 <= TurnSlots::kSlots);
};

template <class Out, bool kTransposed>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kGemmThreads, 1) varlen_k_kernel(const __grid_constant__ VarlenKParams p) {
  using Layout = VarlenKLayout;
  using R = Layout::R;
  using Store = GradStore<Out, kTransposed>;
  constexpr int kBuffers = Layout::kBuffers;
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t smem = smem_u32(raw);
  const R ring{smem, smem + Layout::kControl};
  // The warpgroup is uniform, so that what hangs on it lives in uniform registers: it does not fit beside the tiles else.
  const int wg = uniform(static_cast<int>(threadIdx.x) / 128), tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32, rank = cluster_ctarank();
  if (threadIdx.x == 0) {
    ring.init(129);  // 128 gathering threads and the expected bytes
    TurnSlots::init(smem + Layout::kTurns);
  }
  cluster_sync();
  cudaGridDependencySynchronize();
  const int experts = p.turns.header->experts;  // by no constant load: ptxas moves it up before the wait

  if (wg == 0) {
    reg_dec<56>();
    Slot<R> slot;
    // This thread copies 16-byte chunk tid % 8 of the rows tid / 8 + 16 i of a block.
    const uint32_t dst0 = ring.a(0) + swizzled(tid / 8, tid % 8);
    // Token indices come in windows of 4 blocks: lane l holds blocks l / 16 and 2 + l / 16, rows 4 warp + l % 4 + 16 ((l / 4) % 4). The next window
    // is loaded while this one is used; one block ahead would be too late.
    int window[2], next_window[2];
    auto fetch = [&](const ExpertTile& t, int k) {
      if (t.row >= t.row_end) return;
      const int row = t.row + k * 64 + (lane >> 4) * 64 + ((lane >> 2) & 3) * 16 + warp * 4 + (lane & 3);
#pragma unroll
      for (int i = 0; i < 2; i++) next_window[i] = p.source.load(min(row + 128 * i, t.row_end - 1));
    };
    next_window[0] = next_window[1] = 0;
    Turns<ExpertTurns> turns(p.turns, smem + Layout::kTurns, experts, rank, tid);
    ExpertTile next = SpreadExpert(p.turns.work, turns.next()).gather();  // tiles are loaded two ahead, so that nothing here waits for a load
    fetch(next, 0);
    SpreadExpert after(p.turns.work, turns.next());
    while (next.valid) {
      const ExpertTile t = next;
      next = after.gather();
      after = SpreadExpert(p.turns.work, turns.next());
      const int group = t.tile / p.columns, blocks = t.blocks(), col0 = (group * 2 + rank) * 128 + (tid % 8) * 8;
      const bool inside[2] = {col0 < p.d, col0 + 64 < p.d};  // columns past the matrix stay as they are and are not stored
      const PanelRange panels(p, t.tile - group * p.columns);
      for (int k = 0; k < blocks; k++) {
        if ((k & 3) == 0) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            asm volatile("mov.b32 %0, %1;" : "=r"(window[i]) : "r"(next_window[i]));  // holds the copy here, after the load has landed
            window[i] = static_cast<int>(p.source.token(window[i]));
          }
          if (k + 4 < blocks) fetch(t, k + 4);
          else fetch(next, 0);
        }
        const int held = k & 2 ? window[1] : window[0];
        const uint8_t* src[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          src[i] = reinterpret_cast<const uint8_t*>(p.gathered + col0) +
                   static_cast<size_t>(__shfl_sync(~0u, held, (k & 1) * 16 + i * 4 + (lane >> 3))) * (2 * p.d);
        const int row = t.row + k * 64, v = min(64, t.row_end - row);
        mbar_wait(ring.empty(slot.stage), slot.phase ^ 1);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 2; j++)
            if (inside[j])
              cp_async16_zfill(dst0 + slot.stage * R::kABytes + j * kPanelBytes + i * 2048, src[i] + j * 128, tid / 8 + 16 * i < v ? 16 : 0);
        cp_async_mbar_arrive_noinc(ring.full(slot.stage));
        // The tensor copies come last and from two warps: their rows are mostly in L2, the gathered ones mostly not.
        if (tid == 0) {
          if (k == 0) ring.post(slot.stage, OutputTile{t.expert, blocks, group, panels.first, panels.count, next.valid});
          mbar_arrive_expect_tx(ring.full(slot.stage), panels.count * kPanelBytes);
        }
        const int j = 2 * rank + warp, panel = panels.first + j, plane = panel >= p.panels_per_plane;
        if (lane == 0 && warp < 2 && j < panels.count)
          tma_load_4d_mc(ring.b(slot.stage) + j * kPanelBytes, &p.contiguous, ring.full(slot.stage), (panel - plane * p.panels_per_plane) * 64,
                         64 - v, row + v, plane, 3);
        slot.advance();
      }
    }
  } else {
    reg_inc<224>();
    const int w = wg - 1;
    const uint32_t staging = smem + Layout::kStaging + (Store::kByWarpgroup ? w : w * 4 + warp) * kBuffers * Store::kBytes;
    const bool storer = Store::kByWarpgroup ? tid == 0 : lane == 0;
    auto sync_storers = [&] {
      if constexpr (Store::kByWarpgroup) bar_sync(1 + w, 128);
      else __syncwarp();
    };
    // kBuffers boxes from chunk `first` on, from the fragments at f; kBuffers is all the staging there is.
    auto store = [&](const OutputBlock& o, int first, const auto* f) {
      if (first * Store::kColumns >= o.columns) return;
      if (storer) bulk_wait_read<0>();
      sync_storers();
#pragma unroll
      for (int b = 0; b < kBuffers; b++)
        Store::stage(staging + b * Store::kBytes, raw + (staging - smem) + b * Store::kBytes, f + b * Store::kFragment, warp, lane);
      fence_proxy_async();
      sync_storers();
      if (!storer) return;
#pragma unroll
      for (int b = 0; b < kBuffers; b++) {
        const int col = (first + b) * Store::kColumns;
        if (col >= o.columns) break;
        const int panel = o.panel + col / 64, plane = panel >= p.panels_per_plane;
        const int n = (panel - plane * p.panels_per_plane) * 64 + col % 64,
                  m = (o.group * 2 + rank) * 128 + w * 64 + (Store::kByWarpgroup ? 0 : warp * 16);
        if (p.accumulate) tma_reduce_add_3d(&p.out[plane], staging + b * Store::kBytes, kTransposed ? m : n, kTransposed ? n : m, o.expert);
        else tma_store_3d(&p.out[plane], staging + b * Store::kBytes, kTransposed ? m : n, kTransposed ? n : m, o.expert);
      }
      bulk_commit();
    };
    // A bf16 tile waits as 64 packed registers and leaves while the tensor cores work on the first blocks of the next one.
    constexpr bool kHeld = Store::kBf16;
    constexpr int kHalf = kBuffers * Store::kFragment;
    [[maybe_unused]] uint32_t packed[kHeld ? 64 : 1];
    OutputBlock held{};
    const uint32_t peer = ring.peer();
    Slot<R> slot;
    float acc[128];
    bool more = blockIdx.x / 2 < p.turns.order.items(experts);
    int item = p.turns.order.items(experts) + blockIdx.x / 2;
    // The producers' tiles, then a share of those of the experts without rows, which no stage announces; an accumulator stays as it is.
    const auto next_tile = [&]() -> OutputTile {
      if (uniform(more)) {
        mbar_wait(ring.full(slot.stage), slot.phase);
        const OutputTile t = ring.posted<OutputTile>(slot.stage);
        more = t.more;
        return t;
      }
      if (p.accumulate || item >= p.turns.order.items(p.experts)) return {-1, 0, 0, 0, 0, false};
      const TilePlace place = p.turns.order.place(item, 0);
      item += gridDim.x / 2;
      const PanelRange panels(p, place.column % p.columns);
      return {__ldg(&p.turns.work[place.pair].expert), 0, place.column / p.columns, panels.first, panels.count, false};
    };
    OutputTile t = next_tile();
    while (uniform(t.expert >= 0)) {
      const int blocks = uniform(t.blocks);
      const bool wide = uniform(t.panels > 3);
      const bool any = uniform((t.group * 2 + rank) * 128 + w * 64 < p.d);  // else this warpgroup only releases the stages
      for (int k = 0; k < blocks; k++) {
        mbar_wait(ring.full(slot.stage), slot.phase);
        fence_proxy_async();
        const uint32_t a = ring.a(slot.stage) + w * kPanelBytes, b = ring.b(slot.stage);
        if (any && wide) multiply<256, true, true>(acc, a, b, k > 0);
        else if (any) multiply<192, true, true>(acc, a, b, k > 0);
        if constexpr (kHeld) {
          if (k == 0) store(held, 0, packed);
          if (k == 1) store(held, 2, packed + kHalf);
        }
        wgmma_wait<1>();
        if (k > 0) ring.release(slot.previous(), peer);
        slot.advance();
      }
      const OutputTile next = next_tile();
      wgmma_wait<0>();
      if (blocks > 0) ring.release(slot.previous(), peer);
      const OutputBlock block{t.expert, t.group, t.panel, any ? t.panels * 64 : 0};
      if constexpr (kHeld) {
        if (blocks < 1) store(held, 0, packed);
        if (blocks < 2) store(held, 2, packed + kHalf);
#pragma unroll
        for (int i = 0; i < 64; i++) packed[i] = blocks > 0 ? pack(acc[2 * i], acc[2 * i + 1]) : 0u;
        held = block;
      } else {
        if (blocks == 0) {
#pragma unroll
          for (int i = 0; i < 128; i++) acc[i] = 0.f;
        }
#pragma unroll
        for (int c = 0; c < 256 / Store::kColumns; c += kBuffers) store(block, c, acc + c * Store::kFragment);
      }
      t = next;
    }
    if constexpr (kHeld) {
      store(held, 0, packed);
      store(held, 2, packed + kHalf);
    }
    if (storer) bulk_wait<0>();
  }
  cluster_sync();  // no CTA leaves while its peer may still arrive here
}

struct VarlenKProblem {
  const Shape& shape;
  const Routing& routing;
  const void* gathered;
  const void* contiguous;
  int64_t planes;
  MutableWeight out[2];  // one per plane
  bool accumulate;
  uint32_t* turns;
};

template <class Out, bool kTransposed>
void varlen_k(const VarlenKProblem& q, Stream stream) {
  using Store = GradStore<Out, kTransposed>;
  const Shape& s = q.shape;
  check_aligned(q.gathered, kTransposed ? "x" : "d_o");
  const uint64_t d = s.d, n = s.n, E = s.E, planes = q.planes;
  VarlenKParams p{};
  p.contiguous = ragged_map(q.contiguous, s.R_cap, planes, n, {64, 64});
  for (uint64_t i = 0; i < planes; i++)
    p.out[i] = tensor_map<Out>(q.out[i].base, {kTransposed ? d : n, kTransposed ? n : d, E},
                               {q.out[i].row_stride * sizeof(Out), q.out[i].expert_stride * sizeof(Out)}, {Store::kBoxInner, Store::kBoxOuter, 1},
                               Store::kSwizzle);
  p.gathered = static_cast<const bf16*>(q.gathered);
  p.source = Gather(row_source(s, q.routing));
  p.experts = static_cast<int>(E);
  p.d = static_cast<int>(d);
  p.panels_per_plane = static_cast<int>((n + 63) / 64);
  p.panels = p.panels_per_plane * static_cast<int>(planes);
  p.columns = (p.panels + 3) / 4;
  p.wide = std::max(0, p.panels - 3 * p.columns);
  p.accumulate = q.accumulate;
  const WorkList work = work_list(q.routing.tiles, s.E);
  p.turns = ExpertTurns::make({static_cast<int>((d + 255) / 256) * p.columns}, work.header, work.experts, q.turns);
  const int64_t items = static_cast<int64_t>(E) * p.turns.order.tiles;
  const int clusters = static_cast<int>(std::min<int64_t>(num_sms() / 2, items));
  launch_kernel(varlen_k_kernel<Out, kTransposed>, 2 * clusters, kGemmThreads, VarlenKLayout::kBytes, stream, p);
}

}  // namespace machmoe::cuda::hopper
