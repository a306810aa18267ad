// Y = accumulators; kScaled (rows that were dispatched elsewhere): Y = s (accumulators + b2).
#pragma once
#include "cuda/hopper/gemm/held_tiles.cuh"
#include "cuda/hopper/gemm/row_store.cuh"

namespace machmoe::cuda::hopper {

template <int kColumns, bool kScaled>
struct StoreEpilogue {
  static constexpr bool kNarrow = true;
  static constexpr int kBox = RowStore::kBox, kChunks = kColumns / kBox;
  static constexpr int kStagingBytes = RowStore::kBytes, kNoteBytes = HeldTiles::kBytes;

  struct Params {
    CUtensorMap y;  // ragged_map of [R_cap, 1, d]
    int d;
    const float* score;  // [R_cap], null: 1
    ConstBias b2;
  };
  const Params& p;
  RowStore out;
  HeldTiles tiles;

  DEV StoreEpilogue(const Params& params, uint32_t staging, uint32_t notes) : p(params), out{staging}, tiles(notes) {}
  DEV int columns(const CtaTile& t) const { return p.d - t.column * kColumns; }
  DEV void begin(const CtaTile& t, int row) const { tiles.begin(t, row); }
  DEV void refill() const {}
  DEV void finish() const { out.finish(); }

  // Whether another tile follows.
  DEV bool complete(float (&acc)[kColumns / 2]) {
    const WarpTile t = tiles.complete();
    if (!kScaled || t.rows <= 0) return t.more;
    const int lane = lane_id();
    float score[2] = {1.f, 1.f};
    if (p.score)
      for (int h = 0; h < 2; h++) score[h] = __ldg(p.score + t.row + min(lane / 4 + 8 * h, t.rows - 1));
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 4)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float b = p.b2.base ? bias_at(p.b2, t.expert, t.column * kColumns + 2 * i + 2 * (lane % 4) + e, p.d) : 0.f;
        acc[i + e] = score[0] * (acc[i + e] + b);
        acc[i + 2 + e] = score[1] * (acc[i + 2 + e] + b);
      }
    return t.more;
  }

  DEV void chunk(int c, const uint32_t (&y)[kColumns / 4]) {
    const WarpTile t = tiles.held();
    const int column = t.column * kColumns + c * kBox;
    if (t.rows <= 0 || column >= p.d) return;
    out.acquire();
    out.put([&](int i) { return make_uint2(y[c * (kBox / 4) + i], y[c * (kBox / 4) + i + 1]); });
    out.publish(&p.y, column, t.row, t.rows, 0);
  }
};

}  // namespace machmoe::cuda::hopper
