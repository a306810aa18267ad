// Y = accumulators; kScaled (rows that were dispatched elsewhere): Y = s (accumulators + b2).
#pragma once
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/row_store.cuh"

namespace machmoe::cuda::hopper {

template <int kColumns, int kBox, int kBuffers, bool kScaled> struct StoreEpilogue {
  static constexpr bool kNarrow = true;
  using Store = RowStore<kBox, kBuffers>;

  struct Params {
    CUtensorMap y;             // ragged_store_map of [R_cap, 1, d]
    int d;
    const float* score;        // [R_cap], null: 1
    ConstBias b2;
  };
  const Params& p;
  Store out;

  DEV StoreEpilogue(const Params& params, uint32_t staging, int lane) : p(params), out{staging, lane} {}
  DEV int columns(const CtaTile& t) const { return p.d - t.column * kColumns; }
  DEV void finish() const { out.finish(); }

  DEV void store(float (&acc)[kColumns / 2], const CtaTile& t, int row) {
    const int column0 = t.column * kColumns, rows = t.row_end - row;
    float low = 1.f, high = 1.f;
    if (kScaled && p.score) {
      low = __ldg(p.score + min(row + out.lane / 4, t.row_end - 1));
      high = __ldg(p.score + min(row + out.lane / 4 + 8, t.row_end - 1));
    }
#pragma unroll
    for (int c = 0; c < kColumns / kBox; c++) {
      const int column = column0 + c * kBox;
      if (column >= p.d) break;
      out.acquire();
#pragma unroll
      for (int j = 0; j < kBox / 8; j += 2) {
        const float* f = acc + c * (kBox / 2) + 4 * j;
        if constexpr (kScaled) {
          float b[4] = {};
          if (p.b2.base)
#pragma unroll
            for (int i = 0; i < 4; i++) b[i] = bias_at(p.b2, t.expert, column + 8 * (j + (i >> 1)) + 2 * (out.lane % 4) + (i & 1), p.d);
          out.put(j, pack(low * (f[0] + b[0]), low * (f[1] + b[1])), pack(high * (f[2] + b[0]), high * (f[3] + b[1])),
                  pack(low * (f[4] + b[2]), low * (f[5] + b[3])), pack(high * (f[6] + b[2]), high * (f[7] + b[3])));
        } else {
          out.put(j, pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
        }
      }
      out.publish(&p.y, column, row, rows, 0);
    }
  }
};

}  // namespace machmoe::cuda::hopper
