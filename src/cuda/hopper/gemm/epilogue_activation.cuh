// H = accumulators + b1 to one or two planes, A = act(H). Gate and up of a column stand in the same thread: half a tile is gate, half is up.
#pragma once
#include "core/activation.h"
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/row_store.cuh"

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
template <int kColumns, int kBox, int kBuffers, ActivationKind K, bool kGeneral>
struct ActivationEpilogue {
  static constexpr bool kGated = Activation{K}.gated(), kNarrow = false;
  static constexpr int kWidth = kGated ? kColumns / 2 : kColumns;  // columns of H in a tile
  static constexpr int kUp = kGated ? kColumns / 4 : 0;            // first accumulator of the up plane
  using Store = RowStore<kBox, kBuffers>;

  struct Params {
    CUtensorMap h, a;  // ragged_store_map of [R_cap, planes, n] and [R_cap, 1, n]
    ConstBias b_gate, b_up;
    int n;
    bool store_h, store_a;
    float alpha, limit;
  };
  const Params& p;
  Store out;

  DEV ActivationEpilogue(const Params& params, uint32_t staging, int lane) : p(params), out{staging, lane} {}
  DEV int columns(const CtaTile& t) const { return p.n - t.column * kWidth; }
  DEV void finish() const { out.finish(); }

  DEV void store(float (&d)[kColumns / 2], const CtaTile& t, int row) {
    const int column0 = t.column * kWidth, rows = t.row_end - row;
#pragma unroll
    for (int c = 0; c < kWidth / kBox; c++) {
      const int column = column0 + c * kBox;
      if (column >= p.n) break;
      float *gate = d + c * (kBox / 2), *up = gate + kUp;
      if constexpr (kGeneral) {
        if (kGated && p.b_gate.base) add_bias(gate, p.b_gate, t.expert, column);
        if (p.b_up.base) add_bias(up, p.b_up, t.expert, column);
      }
      if (p.store_h) {
        if constexpr (kGated) box(gate, &p.h, column, row, rows, 0);
        box(up, &p.h, column, row, rows, kGated ? 1 : 0);
      }
      if (p.store_a) {
        out.acquire();
        out.put([&](int i) { return activated(gate + i, up + i); });
        out.publish(&p.a, column, row, rows, 0);
      }
    }
  }

 private:
  DEV uint2 activated(const float* gate, const float* up) const {
    float a[4];
    if constexpr (K == ActivationKind::SwiGLU && !kGeneral) {
      sigmoid4(gate, a);
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] *= gate[i] * up[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = activate<K>(gate[i], up[i], p.alpha, p.limit).a;
    }
    return make_uint2(pack(a[0], a[1]), pack(a[2], a[3]));
  }
  DEV void add_bias(float* f, const ConstBias& b, int expert, int column) const {
#pragma unroll
    for (int i = 0; i < kBox / 2; i += 4)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float v = bias_at(b, expert, column + 2 * i + 2 * (out.lane % 4) + e, p.n);
        f[i + e] += v;
        f[i + 2 + e] += v;
      }
  }
  DEV void box(const float* f, const CUtensorMap* map, int column, int row, int rows, int plane) {
    out.acquire();
    out.put([&](int i) { return make_uint2(pack(f[i], f[i + 1]), pack(f[i + 2], f[i + 3])); });
    out.publish(map, column, row, rows, plane);
  }
};

}  // namespace machmoe::cuda::hopper
