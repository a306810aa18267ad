// Y = accumulators; kScaled (rows that were dispatched elsewhere): Y = s (accumulators + b2).
#pragma once
#include "cuda/hopper/gemm/cta_tile.cuh"
#include "cuda/hopper/gemm/row_store.cuh"

namespace machmoe::cuda::hopper {

template <int kColumns, int kBox_, int kBuffers, bool kScaled>
struct StoreEpilogue {
  static constexpr bool kNarrow = true;
  static constexpr int kBox = kBox_;
  using Store = RowStore<kBox, kBuffers>;

  struct Params {
    CUtensorMap y;  // ragged_store_map of [R_cap, 1, d]
    int d;
    const float* score;  // [R_cap], null: 1
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
      const float* f = acc + c * (kBox / 2);
      out.put([&](int i) {
        if constexpr (!kScaled) return make_uint2(pack(f[i], f[i + 1]), pack(f[i + 2], f[i + 3]));
        const int at = column + 2 * i + 2 * (out.lane % 4);
        const float b0 = p.b2.base ? bias_at(p.b2, t.expert, at, p.d) : 0.f, b1 = p.b2.base ? bias_at(p.b2, t.expert, at + 1, p.d) : 0.f;
        return make_uint2(pack(low * (f[i] + b0), low * (f[i + 1] + b1)), pack(high * (f[i + 2] + b0), high * (f[i + 3] + b1)));
      });
      out.publish(&p.y, column, row, rows, 0);
    }
  }
};

}  // namespace machmoe::cuda::hopper
