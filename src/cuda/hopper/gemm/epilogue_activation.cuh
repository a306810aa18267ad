// H = accumulators + b1 to one or two planes, A = act(H). Gate and up of a column stand in the same thread: half a tile is gate, half is up.
#pragma once
#include "core/activation.h"
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/row_store.cuh"

namespace machmoe::cuda::hopper {

// kGeneral: with biases, and for SwiGLU and swiglu_oai with a limit. The common case carries no code for them.
template <int kColumns, int kBox, int kBuffers, ActivationKind K, bool kGeneral> struct ActivationEpilogue {
  static constexpr bool kGated = Activation{K}.gated(), kNarrow = false;
  static constexpr int kWidth = kGated ? kColumns / 2 : kColumns;   // columns of H in a tile
  static constexpr int kUp = kGated ? kColumns / 4 : 0;             // first accumulator of the up plane
  using Store = RowStore<kBox, kBuffers>;

  struct Params {
    CUtensorMap h, a;          // ragged_store_map of [R_cap, planes, n] and [R_cap, 1, n]
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
        const float alpha = p.alpha, limit = kGeneral ? p.limit : 0.f;
        out.acquire();
#pragma unroll
        for (int j = 0; j < kBox / 8; j += 2) {
          uint32_t r[4];
#pragma unroll
          for (int q = 0; q < 4; q++) {
            const int i = 4 * j + 2 * q;
            r[q] = pack(activate<K>(gate[i], up[i], alpha, limit).a, activate<K>(gate[i + 1], up[i + 1], alpha, limit).a);
          }
          out.put(j, r[0], r[1], r[2], r[3]);
        }
        out.publish(&p.a, column, row, rows, 0);
      }
    }
  }

 private:
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
#pragma unroll
    for (int j = 0; j < kBox / 8; j += 2) {
      const float* g = f + 4 * j;
      out.put(j, pack(g[0], g[1]), pack(g[2], g[3]), pack(g[4], g[5]), pack(g[6], g[7]));
    }
    out.publish(map, column, row, rows, plane);
  }
};

}  // namespace machmoe::cuda::hopper
