// The experts ops (src/ops.h) on the CPU. Work is cut into (expert, tile) items of fixed size, each a dense product of one thread (cpu/gemm.h)
// with its epilogue; nothing depends on how many threads there are.
#include "cpu/experts.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/activation.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace machmoe::cpu {
namespace {

constexpr int64_t kRowTile = 128;     // rows of an expert, or rows of a weight gradient, in one item
constexpr int64_t kTokenBlock = 256;  // rows that one product of a weight gradient reduces; blocks are added in order

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t rows) { return ceil_div(rows, kGemmGranule) * kGemmGranule; }

// Rows first .. first + rows - 1 of one expert.
struct RowTile {
  int64_t expert, first, rows;
};
std::vector<RowTile> row_tiles(const Shape& s, const Routing& r) {
  std::vector<RowTile> tiles;
  for (int64_t e = 0; e < s.E; e++)
    for (int64_t row = r.offsets[e]; row < r.offsets[e + 1]; row += kRowTile)
      tiles.push_back({e, row, std::min<int64_t>(kRowTile, r.offsets[e + 1] - row)});
  return tiles;
}

// Scratch of this thread, kept between calls; one buffer for each purpose.
enum Scratch { kLeft, kRight, kTile, kGateTile, kBias, kGateBias, kRow, kScratchCount };
template <class T>
T* scratch(Scratch purpose, int64_t count) {
  static thread_local std::vector<T> buffers[kScratchCount];
  std::vector<T>& b = buffers[purpose];
  if (static_cast<int64_t>(b.size()) < count) b.resize(static_cast<size_t>(count));
  return b.data();
}

// A view of rows that a product can read: `rows` rows of `cols` columns, then zero rows up to padded(rows).
template <class T>
struct Operand {
  const T* data;
  int64_t ld;
};
// Rows with an index are gathered. Others are used in place unless they need padding: what follows an expert's rows is another's.
template <class T>
Operand<T> rows_operand(const T* base, int64_t ld, RowSource source, int64_t first, int64_t rows, int64_t first_col, int64_t cols, Scratch purpose) {
  if (!source.index && padded(rows) == rows) return {base + first * ld + first_col, ld};
  T* out = scratch<T>(purpose, padded(rows) * cols);
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(out + i * cols, base + source[first + i] * ld + first_col, static_cast<size_t>(cols) * sizeof(T));
  }
  std::memset(static_cast<void*>(out + rows * cols), 0, static_cast<size_t>((padded(rows) - rows) * cols) * sizeof(T));
  return {out, cols};
}

template <class T, class View>
auto* expert_base(const View& w, int64_t e) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(w.base)>>, const T, T>;
  return static_cast<Element*>(w.base) + e * w.expert_stride;
}
template <class T>
AccumOf<T> bias_at(const ConstBias& b, int64_t e, int64_t i) {
  return static_cast<AccumOf<T>>(static_cast<const T*>(b.base)[e * b.expert_stride + i * b.stride]);
}
template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::F64 : std::is_same_v<T, float> ? DType::F32 : std::is_same_v<T, BF16> ? DType::BF16 : DType::F16;
}

// Bias of one plane as a dense vector of the accumulation type; null without a bias.
template <class T>
const AccumOf<T>* dense_bias(const ConstBias& b, int64_t e, int64_t count, Scratch purpose) {
  if (!b.base) return nullptr;
  auto* out = scratch<AccumOf<T>>(purpose, count);
  for (int64_t i = 0; i < count; i++) out[i] = bias_at<T>(b, e, i);
  return out;
}

// ---- H and A -------------------------------------------------------------------------------------------------------------------
// One row of the epilogue: bias, rounding of H to its storage type, activation of the rounded value (the backward reads that one).
template <ActivationKind kind, class T, class Accum>
void activate_row(const Accum* gate, const Accum* up, const Accum* b_gate, const Accum* b_up, const Activation& act, int64_t n, T* h, T* a) {
  constexpr bool gated = kind <= ActivationKind::ReGLU;
  const Accum alpha = static_cast<Accum>(act.alpha), limit = static_cast<Accum>(act.limit);
  T* h_up = h + (gated ? n : 0);
  for (int64_t i = 0; i < n; i++) {
    if constexpr (gated) h[i] = static_cast<T>(b_gate ? gate[i] + b_gate[i] : gate[i]);
    h_up[i] = static_cast<T>(b_up ? up[i] + b_up[i] : up[i]);
  }
  for (int64_t i = 0; a && i < n; i++)
    a[i] = static_cast<T>(activate<kind>(gated ? static_cast<Accum>(h[i]) : Accum(0), static_cast<Accum>(h_up[i]), alpha, limit).a);
}

template <ActivationKind kind, class T>
void up_proj_of(const UpProjArgs& p) {
  using Accum = AccumOf<T>;
  constexpr bool gated = kind <= ActivationKind::ReGLU;
  const Shape& s = p.shape;
  const int64_t planes = s.planes(), n = s.n, d = s.d;
  const std::vector<RowTile> tiles = row_tiles(s, p.routing);
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
    const RowTile t = tiles[static_cast<size_t>(item)];
    const int64_t M = padded(t.rows);
    const auto x = rows_operand(static_cast<const T*>(p.x), d, row_source(s, p.routing), t.first, t.rows, 0, d, kLeft);
    Accum *up = scratch<Accum>(kTile, M * n), *gate = gated ? scratch<Accum>(kGateTile, M * n) : nullptr;
    gemm({GemmLayout::NT, s.dtype, false, M, n, d, x.data, x.ld, expert_base<T>(p.w1_up, t.expert), p.w1_up.row_stride, up, n});
    if (gated) gemm({GemmLayout::NT, s.dtype, false, M, n, d, x.data, x.ld, expert_base<T>(p.w1_gate, t.expert), p.w1_gate.row_stride, gate, n});
    const Accum* b_up = dense_bias<T>(p.b1_up, t.expert, n, kBias);
    const Accum* b_gate = gated ? dense_bias<T>(p.b1_gate, t.expert, n, kGateBias) : nullptr;
    T* no_h = scratch<T>(kRow, planes * n);
    for (int64_t i = 0; i < t.rows; i++) {
      const int64_t row = t.first + i;
      T* h = p.h ? static_cast<T*>(p.h) + row * planes * n : no_h;
      activate_row<kind>(gated ? gate + i * n : nullptr, up + i * n, b_gate, b_up, s.act, n, h, p.a ? static_cast<T*>(p.a) + row * n : nullptr);
    }
  });
}

// ---- Y -------------------------------------------------------------------------------------------------------------------------
template <class T>
void zero_rows_past(int64_t R, const Shape& s, void* rows) {
  if (s.R_cap > R) std::memset(static_cast<void*>(static_cast<T*>(rows) + R * s.d), 0, static_cast<size_t>((s.R_cap - R) * s.d) * sizeof(T));
}
template <class T>
AccumOf<T> score_of(const Shape& s, const Routing& r, int64_t row) {
  return r.score ? static_cast<const AccumOf<T>*>(r.score)[s.kind == RoutingKind::TopK ? r.slot[row] : row] : AccumOf<T>(1);
}

template <class T>
void down_proj_of(const DownProjArgs& p) {
  using Accum = AccumOf<T>;
  const Shape& s = p.shape;
  const bool rows_kind = s.kind == RoutingKind::Rows;
  const std::vector<RowTile> tiles = row_tiles(s, p.routing);
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
    const RowTile t = tiles[static_cast<size_t>(item)];
    const int64_t M = padded(t.rows), d = s.d;
    const auto a = rows_operand(static_cast<const T*>(p.a), s.n, {}, t.first, t.rows, 0, s.n, kLeft);
    Accum* c = scratch<Accum>(kTile, M * d);
    gemm({GemmLayout::NT, s.dtype, false, M, d, s.n, a.data, a.ld, expert_base<T>(p.w2, t.expert), p.w2.row_stride, c, d});
    const Accum* b2 = rows_kind ? dense_bias<T>(p.b2, t.expert, d, kBias) : nullptr;
    for (int64_t i = 0; i < t.rows; i++) {
      T* y = static_cast<T*>(p.y) + (t.first + i) * d;
      const Accum *from = c + i * d, score = rows_kind ? score_of<T>(s, p.routing, t.first + i) : Accum(1);
      if (b2) {
        for (int64_t j = 0; j < d; j++) y[j] = static_cast<T>(score * (from[j] + b2[j]));
      } else {
        for (int64_t j = 0; j < d; j++) y[j] = static_cast<T>(score * from[j]);
      }
    }
  });
  if (rows_kind) zero_rows_past<T>(p.routing.offsets[s.E], s, p.y);
}

// ---- dS, O and dX ----------------------------------------------------------------------------------------------------------------
template <class Accum, class Out>
void score_grad_of(const ScoreGradArgs& p) {
  const Shape& s = p.shape;
  const int64_t R = p.routing.offsets[s.E];
  const auto* parts = static_cast<const Accum*>(p.ds_parts);
  auto* out = static_cast<Out*>(p.dscore);
  for (int64_t slot = 0; slot < s.R_cap; slot++) {
    const int64_t row = s.kind == RoutingKind::TopK ? p.routing.inverse[slot] : slot < R ? slot : -1;
    Accum sum = 0;
    for (int64_t part = 0; row >= 0 && part < p.parts; part++) sum += parts[part * s.R_cap + row];
    out[slot] = static_cast<Out>(sum);
  }
}

template <class T>
void aggregate_of(const AggregateArgs& p) {
  using Accum = AccumOf<T>;
  const Shape& s = p.shape;
  const Routing& r = p.routing;
  const int64_t d = s.d;
  constexpr int64_t kBlock = 64;
  parallel_for(ceil_div(s.T, kBlock), [&](int64_t block) {
    Accum* sum = scratch<Accum>(kTile, d);
    for (int64_t t = block * kBlock; t < std::min(s.T, (block + 1) * kBlock); t++) {
      const T* addend = static_cast<const T*>(p.addend) + t * d;
      for (int64_t j = 0; j < d; j++) sum[j] = p.addend ? static_cast<Accum>(addend[j]) : Accum(0);
      const bool topk = s.kind == RoutingKind::TopK;
      const int64_t begin = topk ? t * s.K : r.token_offsets[t], end = topk ? begin + s.K : r.token_offsets[t + 1];
      for (int64_t slot = begin; slot < end; slot++) {
        const int64_t row = r.inverse[slot];
        if (row < 0) continue;
        const T* y = static_cast<const T*>(p.y) + row * d;
        const Accum score = p.weighted ? score_of<T>(s, r, row) : Accum(1);
        for (int64_t j = 0; j < d; j++) sum[j] += score * static_cast<Accum>(y[j]);
        if (!p.weighted || !p.b2.base) continue;
        const int64_t e = std::upper_bound(r.offsets, r.offsets + s.E + 1, row) - r.offsets - 1;
        for (int64_t j = 0; j < d; j++) sum[j] += score * bias_at<T>(p.b2, e, j);
      }
      T* out = static_cast<T*>(p.out) + t * d;
      for (int64_t j = 0; j < d; j++) out[j] = static_cast<T>(sum[j]);
    }
  });
}

// ---- dH, A' and dS ---------------------------------------------------------------------------------------------------------------
// One row of the epilogue. da = dA' of this row; returns <dA', A>.
template <ActivationKind kind, class T, class Accum>
Accum backward_row(const Accum* da, const T* h, Accum score, const Activation& act, int64_t n, T* dh, T* a_prime) {
  constexpr bool gated = kind <= ActivationKind::ReGLU;
  const Accum alpha = static_cast<Accum>(act.alpha), limit = static_cast<Accum>(act.limit);
  const T* up = h + (gated ? n : 0);
  T* d_up = dh + (gated ? n : 0);
  Accum* product = scratch<Accum>(kRow, n);
  for (int64_t i = 0; i < n; i++) {
    const auto g = activate<kind>(gated ? static_cast<Accum>(h[i]) : Accum(0), static_cast<Accum>(up[i]), alpha, limit);
    if constexpr (gated) dh[i] = static_cast<T>(score * da[i] * g.d_gate);
    d_up[i] = static_cast<T>(score * da[i] * g.d_up);
    a_prime[i] = static_cast<T>(score * g.a);
    product[i] = da[i] * g.a;
  }
  Accum sum = 0;
  for (int64_t i = 0; i < n; i++) sum += product[i];
  return sum;
}

template <ActivationKind kind, class T>
void down_proj_bwd_of(const DownProjBwdArgs& p) {
  using Accum = AccumOf<T>;
  const Shape& s = p.shape;
  const int64_t planes = s.planes(), n = s.n, d = s.d;
  const std::vector<RowTile> tiles = row_tiles(s, p.routing);
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
    const RowTile t = tiles[static_cast<size_t>(item)];
    const int64_t M = padded(t.rows);
    const auto d_o = rows_operand(static_cast<const T*>(p.d_o), d, row_source(s, p.routing), t.first, t.rows, 0, d, kLeft);
    Accum* da = scratch<Accum>(kTile, M * n);
    gemm({GemmLayout::NN, s.dtype, false, M, n, d, d_o.data, d_o.ld, expert_base<T>(p.w2, t.expert), p.w2.row_stride, da, n});
    const Accum* b2 = dense_bias<T>(p.b2, t.expert, d, kBias);
    for (int64_t i = 0; i < t.rows; i++) {
      const int64_t row = t.first + i;
      const T* h = static_cast<const T*>(p.h) + row * planes * n;
      Accum ds = backward_row<kind>(da + i * n, h, score_of<T>(s, p.routing, row), s.act, n, static_cast<T*>(p.dh) + row * planes * n,
                                    static_cast<T*>(p.a_prime) + row * n);
      for (int64_t j = 0; b2 && j < d; j++) ds += static_cast<Accum>(d_o.data[i * d_o.ld + j]) * b2[j];
      static_cast<Accum*>(p.ds_parts)[row] = ds;
    }
  });
}

// ---- dX~ -------------------------------------------------------------------------------------------------------------------------
template <class T>
void up_proj_bwd_of(const UpProjBwdArgs& p) {
  using Accum = AccumOf<T>;
  const Shape& s = p.shape;
  const int64_t planes = s.planes(), n = s.n, d = s.d;
  const std::vector<RowTile> tiles = row_tiles(s, p.routing);
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item) {
    const RowTile t = tiles[static_cast<size_t>(item)];
    const int64_t M = padded(t.rows);
    const auto dh = rows_operand(static_cast<const T*>(p.dh), planes * n, {}, t.first, t.rows, 0, planes * n, kLeft);
    Accum* c = scratch<Accum>(kTile, M * d);
    if (planes == 2) gemm({GemmLayout::NN, s.dtype, false, M, d, n, dh.data, dh.ld, expert_base<T>(p.w1_gate, t.expert), p.w1_gate.row_stride, c, d});
    gemm({GemmLayout::NN, s.dtype, planes == 2, M, d, n, dh.data + (planes - 1) * n, dh.ld, expert_base<T>(p.w1_up, t.expert), p.w1_up.row_stride, c,
          d});
    for (int64_t i = 0; i < t.rows; i++) {
      T* out = static_cast<T*>(p.dx_rows) + (t.first + i) * d;
      for (int64_t j = 0; j < d; j++) out[j] = static_cast<T>(c[i * d + j]);
    }
  });
  if (s.kind == RoutingKind::Rows) zero_rows_past<T>(p.routing.offsets[s.E], s, p.dx_rows);
}

// ---- dW2, dW1 --------------------------------------------------------------------------------------------------------------------
// Adds a dense fp32 (fp64) tile to, or stores it into, rows of a weight gradient.
template <class Out, class Accum>
void store_rows(const Accum* c, int64_t rows, int64_t cols, Out* out, int64_t row_stride, bool accumulate) {
  for (int64_t i = 0; i < rows; i++, c += cols, out += row_stride) {
    if (accumulate) {
      for (int64_t j = 0; j < cols; j++) out[j] = static_cast<Out>(static_cast<Accum>(out[j]) + c[j]);
    } else {
      for (int64_t j = 0; j < cols; j++) out[j] = static_cast<Out>(c[j]);
    }
  }
}

// P_e[rows first .. first + count, cols] = sum over the rows r of expert e of left_r[first + i] right_r[j], in blocks of kTokenBlock rows.
template <class T>
struct Reduction {
  const T* left;
  int64_t left_ld;
  RowSource left_source;
  const T* right;
  int64_t right_ld;
  RowSource right_source;
  int64_t cols;
};
template <class T>
void reduce_rows(const Shape& s, const Routing& r, const Reduction<T>& p, int64_t e, int64_t first, int64_t count, AccumOf<T>* c) {
  const int64_t begin = r.offsets[e], end = r.offsets[e + 1];
  if (begin == end) std::fill(c, c + count * p.cols, AccumOf<T>(0));
  for (int64_t row = begin; row < end; row += kTokenBlock) {
    const int64_t rows = std::min(kTokenBlock, end - row);
    const auto left = rows_operand(p.left, p.left_ld, p.left_source, row, rows, first, count, kLeft);
    const auto right = rows_operand(p.right, p.right_ld, p.right_source, row, rows, 0, p.cols, kRight);
    gemm({GemmLayout::TN, s.dtype, row != begin, count, p.cols, padded(rows), left.data, left.ld, right.data, right.ld, c, p.cols});
  }
}

template <class T, class Out>
void weight_grad_of(const Shape& s, const Routing& r, const Reduction<T>& p, int64_t rows_of_weight, const MutableWeight& dw, bool accumulate) {
  using Accum = AccumOf<T>;
  const int64_t row_tiles_of_weight = ceil_div(rows_of_weight, kRowTile);
  parallel_for(s.E * row_tiles_of_weight, [&](int64_t item) {
    const int64_t e = item / row_tiles_of_weight, first = item % row_tiles_of_weight * kRowTile, count = std::min(kRowTile, rows_of_weight - first);
    if (accumulate && r.offsets[e] == r.offsets[e + 1]) return;
    Accum* c = scratch<Accum>(kTile, count * p.cols);
    reduce_rows(s, r, p, e, first, count, c);
    store_rows(c, count, p.cols, expert_base<Out>(dw, e) + first * dw.row_stride, dw.row_stride, accumulate);
  });
}

// ---- db1, db2 --------------------------------------------------------------------------------------------------------------------
// Column sums over the rows of an expert, each row times its factor, in row order.
template <class T, class Out, class Factor>
void column_sums(const Shape& s, const Routing& r, const T* rows, int64_t ld, RowSource source, int64_t cols, const MutableBias& out, bool accumulate,
                 Factor factor) {
  using Accum = AccumOf<T>;
  if (!out.base) return;
  parallel_for(s.E, [&](int64_t e) {
    Accum* sum = scratch<Accum>(kTile, cols);
    std::fill(sum, sum + cols, Accum(0));
    for (int64_t row = r.offsets[e]; row < r.offsets[e + 1]; row++) {
      const T* from = rows + source[row] * ld;
      const Accum f = factor(row);
      for (int64_t j = 0; j < cols; j++) sum[j] += f * static_cast<Accum>(from[j]);
    }
    Out* to = expert_base<Out>(out, e);
    for (int64_t j = 0; j < cols; j++) to[j * out.stride] = static_cast<Out>(accumulate ? static_cast<Accum>(to[j * out.stride]) + sum[j] : sum[j]);
  });
}

// f(type of the layer, type of the gradients)
template <class F>
void dispatch_grad(const Shape& s, DType out, F&& f) {
  dispatch_float(s.dtype, [&](auto layer) {
    using T = typename decltype(layer)::type;
    if (out == s.dtype) f(layer, layer);
    else if constexpr (!std::is_same_v<T, double>) f(layer, std::type_identity<float>());
  });
}

}  // namespace

void up_proj(const UpProjArgs& p, Stream) {
  dispatch_float(p.shape.dtype, [&](auto type) {
    dispatch_activation(p.shape.act.kind, [&](auto act) { up_proj_of<decltype(act)::kind, typename decltype(type)::type>(p); });
  });
}
void down_proj(const DownProjArgs& p, Stream) {
  dispatch_float(p.shape.dtype, [&](auto type) { down_proj_of<typename decltype(type)::type>(p); });
}
void aggregate(const AggregateArgs& p, Stream) {
  dispatch_float(p.shape.dtype, [&](auto type) { aggregate_of<typename decltype(type)::type>(p); });
}
void score_grad(const ScoreGradArgs& p, Stream) {
  dispatch_float(p.dscore_dtype, [&](auto out) {
    using Out = typename decltype(out)::type;
    score_grad_of<AccumOf<Out>, Out>(p);
  });
}
void down_proj_bwd(const DownProjBwdArgs& p, Stream) {
  dispatch_float(p.shape.dtype, [&](auto type) {
    dispatch_activation(p.shape.act.kind, [&](auto act) { down_proj_bwd_of<decltype(act)::kind, typename decltype(type)::type>(p); });
  });
}
void up_proj_bwd(const UpProjBwdArgs& p, Stream) {
  dispatch_float(p.shape.dtype, [&](auto type) { up_proj_bwd_of<typename decltype(type)::type>(p); });
}

void weight_grad_w2(const WeightGradW2Args& p, Stream) {
  dispatch_grad(p.shape, p.out_dtype, [&](auto type, auto out) {
    using T = typename decltype(type)::type;
    const Reduction<T> product{
        static_cast<const T*>(p.d_o), p.shape.d, row_source(p.shape, p.routing), static_cast<const T*>(p.a_prime), p.shape.n, {}, p.shape.n};
    weight_grad_of<T, typename decltype(out)::type>(p.shape, p.routing, product, p.shape.d, p.dw2, p.accumulate);
  });
}
void weight_grad_w1(const WeightGradW1Args& p, Stream) {
  dispatch_grad(p.shape, p.out_dtype, [&](auto type, auto out) {
    using T = typename decltype(type)::type;
    const int64_t planes = p.shape.planes(), n = p.shape.n;
    const RowSource source = row_source(p.shape, p.routing);
    for (int64_t plane = 0; plane < planes; plane++) {
      const Reduction<T> product{static_cast<const T*>(p.dh) + plane * n, planes * n, {}, static_cast<const T*>(p.x), p.shape.d, source, p.shape.d};
      weight_grad_of<T, typename decltype(out)::type>(p.shape, p.routing, product, n, planes == 2 && plane == 0 ? p.dw1_gate : p.dw1_up,
                                                      p.accumulate);
    }
  });
}

void bias_grad(const BiasGradArgs& p, Stream) {
  const Shape& s = p.shape;
  dispatch_grad(s, p.out_dtype, [&](auto type, auto out) {
    using T = typename decltype(type)::type;
    using Out = typename decltype(out)::type;
    const auto one = [](int64_t) { return AccumOf<T>(1); };
    const int64_t planes = s.planes(), ld = planes * s.n;
    const auto* dh = static_cast<const T*>(p.dh);
    if (planes == 2) column_sums<T, Out>(s, p.routing, dh, ld, {}, s.n, p.db1_gate, p.accumulate, one);
    column_sums<T, Out>(s, p.routing, dh + (planes - 1) * s.n, ld, {}, s.n, p.db1_up, p.accumulate, one);
    column_sums<T, Out>(s, p.routing, static_cast<const T*>(p.d_o), s.d, row_source(s, p.routing), s.d, p.db2, p.accumulate,
                        [&](int64_t row) { return score_of<T>(s, p.routing, row); });
  });
}

}  // namespace machmoe::cpu
