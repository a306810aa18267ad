// H = accumulators + b1 to one or two planes in bf16, A = act(H). Gate and up of a column stand in the same thread: half a tile is gate, half is up.
#pragma once
#include "core/activation.h"
#include "cuda/hopper/gemm/held_tiles.cuh"
#include "cuda/hopper/gemm/row_store.cuh"
#include "cuda/math.cuh"

namespace machmoe::cuda::hopper {

// Four sigmoids with one reciprocal: the special function unit is what an epilogue waits for. 1 / e0 = e1 e2 e3 / (e0 e1 e2 e3); below -20 a sigmoid
// stays 2e-9, so that the product is finite.
DEV void sigmoid4(const float* x, float (&s)[4]) {
  float e[4];
#pragma unroll
  for (int i = 0; i < 4; i++) e[i] = 1.f + exp2_approx(-1.44269504f * fmaxf(x[i], -20.f));
  const float low = e[0] * e[1], high = e[2] * e[3], r = rcp_approx(low * high), r_low = r * high, r_high = r * low;
  s[0] = r_low * e[1];
  s[1] = r_low * e[0];
  s[2] = r_high * e[3];
  s[3] = r_high * e[2];
}

// kGeneral: with biases, and for SwiGLU and swiglu_oai with a limit. The common case carries no code for them.
template <int kColumns, ActivationKind K, bool kGeneral>
struct ActivationEpilogue {
  static constexpr bool kGated = Activation{K}.gated(), kNarrow = false;
  static constexpr int kWidth = kGated ? kColumns / 2 : kColumns;         // columns of H in a tile
  static constexpr int kUp = kGated ? kColumns / 8 : 0;                   // first held pair of the up plane
  static constexpr int kBox = RowStore::kBox, kChunks = kColumns / kBox;  // gated: the planes of H of a box, then its A; else both of a box
  static constexpr int kStagingBytes = RowStore::kBytes, kNoteBytes = HeldTiles::kBytes;

  struct Params {
    CUtensorMap h, a;  // ragged_map of [R_cap, planes, n] and [R_cap, 1, n]
    ConstBias b_gate, b_up;
    int n;
    bool store_h, store_a;
    float alpha, limit;
  };
  const Params& p;
  RowStore out;
  HeldTiles tiles;

  DEV ActivationEpilogue(const Params& params, uint32_t staging, uint32_t notes) : p(params), out{staging}, tiles(notes) {}
  DEV int columns(const CtaTile& t) const { return p.n - t.column * kWidth; }
  DEV void begin(const CtaTile& t, int row) const { tiles.begin(t, row); }
  DEV void refill() const {}
  DEV void finish() const { out.finish(); }

  // Whether another tile follows.
  DEV bool complete(float (&acc)[kColumns / 2]) {
    const WarpTile t = tiles.complete();
    if constexpr (kGeneral) {
      if (kGated && p.b_gate.base) add_bias(acc, p.b_gate, t);
      if (p.b_up.base) add_bias(acc + 2 * kUp, p.b_up, t);
    }
    return t.more;
  }

  DEV void chunk(int c, const uint32_t (&h)[kColumns / 4]) {
    const WarpTile t = tiles.held();
    const int box = kGated ? c / 2 : c, column = t.column * kWidth + box * kBox;
    if (t.rows <= 0 || column >= p.n) return;
    const uint32_t *gate = h + box * (kBox / 4), *up = gate + kUp;
    if (p.store_h && (!kGated || c % 2 == 0)) {
      if constexpr (kGated) store(&p.h, t, column, 0, [&](int i) { return make_uint2(gate[i], gate[i + 1]); });
      store(&p.h, t, column, kGated ? 1 : 0, [&](int i) { return make_uint2(up[i], up[i + 1]); });
    }
    if (p.store_a && (!kGated || c % 2 == 1)) store(&p.a, t, column, 0, [&](int i) { return activated(gate + i, up + i); });
  }

 private:
  template <class F>
  DEV void store(const CUtensorMap* map, const WarpTile& t, int column, int plane, F&& pairs) {
    out.acquire();
    out.put(pairs);
    out.publish(map, column, t.row, t.rows, plane);
  }
  // A of four elements: two pairs of each plane.
  DEV uint2 activated(const uint32_t* gate, const uint32_t* up) const {
    if constexpr (K == ActivationKind::SwiGLU && !kGeneral) {
      const float2 g0 = unpack_here(gate[0]), g1 = unpack_here(gate[1]), u0 = unpack_here(up[0]), u1 = unpack_here(up[1]);
      const float g[4] = {g0.x, g0.y, g1.x, g1.y};
      float a[4];
      sigmoid4(g, a);
      return make_uint2(pack(a[0] * g0.x * u0.x, a[1] * g0.y * u0.y), pack(a[2] * g1.x * u1.x, a[3] * g1.y * u1.y));
    } else {
      return make_uint2(activated(gate[0], up[0]), activated(gate[1], up[1]));
    }
  }
  DEV uint32_t activated(uint32_t gate, uint32_t up) const {
    const float2 g = unpack_here(gate), u = unpack_here(up);
    return pack(activate<K>(g.x, u.x, p.alpha, p.limit).a, activate<K>(g.y, u.y, p.alpha, p.limit).a);
  }
  DEV void add_bias(float* f, const ConstBias& b, const WarpTile& t) const {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kWidth / 2; i += 4)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float v = bias_at(b, t.expert, t.column * kWidth + 2 * i + 2 * (lane % 4) + e, p.n);
        f[i + e] += v;
        f[i + 2 + e] += v;
      }
  }
};

}  // namespace machmoe::cuda::hopper
