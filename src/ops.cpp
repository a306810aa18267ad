// Host checks of every op's arguments: shapes, types and null pointers. Nothing here reads device memory.
#include "ops.h"

#include <limits>

#include "core/check.h"

namespace machmoe {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxStride = int64_t{1} << 39;  // elements of one expert: addresses of 2^20 experts stay within 64 bits

bool is_float(DType t) { return t == DType::F32 || t == DType::BF16 || t == DType::F16 || t == DType::F64; }
bool is_index(DType t) { return t == DType::I32 || t == DType::I64; }

void require(const void* pointer, const char* name) { MACHMOE_CHECK(pointer, "{} is null, expected a device pointer: allocate it", name); }

// Pointers of buffers that may be empty.
void require_rows(const void* pointer, int64_t elements, const char* name) {
  if (elements > 0) require(pointer, name);
}

// `count` pieces of `size` elements, `stride` apart, in each expert. One expert has no next one: its expert_stride may be anything.
void check_strides(const Shape& s, int64_t count, int64_t size, int64_t stride, int64_t expert_stride, const char* name, const char* stride_name) {
  MACHMOE_CHECK(stride >= size && stride <= kMaxStride / count, "{}.{} is {}, expected {} .. {}: strides count elements", name, stride_name, stride,
                size, kMaxStride / count);
  const int64_t extent = (count - 1) * stride + size;
  MACHMOE_CHECK(s.E == 1 || (expert_stride >= extent && expert_stride <= kMaxStride), "{}.expert_stride is {}, expected {} .. {} beside a {} of {}",
                name, expert_stride, extent, kMaxStride, stride_name, stride);
}
template <class View>
void check_matrix(const Shape& s, const View& w, int64_t rows, int64_t cols, const char* name) {
  require(w.base, name);
  check_strides(s, rows, cols, w.row_stride, w.expert_stride, name, "row_stride");
}
template <class View>
void check_bias(const Shape& s, const View& b, int64_t cols, const char* name) {
  if (b.base) check_strides(s, cols, 1, b.stride, b.expert_stride, name, "stride");
}
template <class View>
void check_w1(const Shape& s, const View& gate, const View& up, const char* gate_name, const char* up_name) {
  check_matrix(s, up, s.n, s.d, up_name);
  if (s.act.gated()) check_matrix(s, gate, s.n, s.d, gate_name);
  else MACHMOE_CHECK(!gate.base, "{} is given, expected none: this activation has no gate, pass its weight as {}", gate_name, up_name);
}
template <class View>
void check_b1(const Shape& s, const View& gate, const View& up, const char* gate_name, const char* up_name) {
  check_bias(s, up, s.n, up_name);
  check_bias(s, gate, s.n, gate_name);
  if (s.act.gated())
    MACHMOE_CHECK(!gate.base == !up.base, "{} is {} and {} is {}, expected both or none", gate_name, gate.base ? "given" : "null", up_name,
                  up.base ? "given" : "null");
  else MACHMOE_CHECK(!gate.base, "{} is given, expected none: this activation has no gate, pass its bias as {}", gate_name, up_name);
}

void check_routing(const Shape& s, const Routing& r) {
  require(r.counts, "routing.counts");
  require(r.offsets, "routing.offsets");
  if (s.kind != RoutingKind::TopK) MACHMOE_CHECK(!r.slot, "routing.slot is given, expected null: only the rows of top-K (TOPK) have slots");
  if (s.kind == RoutingKind::Rows) {
    MACHMOE_CHECK(!r.token, "routing.token is given, expected null: dispatched rows (ROWS) gather nothing");
    return;
  }
  require_rows(r.inverse, s.R_cap, "routing.inverse");
  if (s.kind == RoutingKind::TopK) {
    require_rows(r.slot, s.R_cap, "routing.slot");
    return;
  }
  require_rows(r.token, s.R_cap, "routing.token");
  require_rows(r.score, s.R_cap, "routing.score");
  require(r.token_offsets, "routing.token_offsets");
}
// Of the ops that read scores.
void check_scored_routing(const Shape& s, const Routing& r) {
  check_routing(s, r);
  check_scores(s, r);
}

void check_grad_dtype(const Shape& s, DType dtype) {
  MACHMOE_CHECK(dtype == s.dtype || (dtype == DType::F32 && s.dtype != DType::F64), "grad_dtype is {}, expected the layer's dtype {} or F32 (0)",
                static_cast<int>(dtype), static_cast<int>(s.dtype));
}

}  // namespace

void check_scores(const Shape& s, const Routing& r) {
  if (s.kind == RoutingKind::TopK)
    MACHMOE_CHECK(r.score || s.R_cap == 0, "routing.score is null, expected the top-K weights [T, K] in {}: set it, a carved routing has none",
                  s.accum() == DType::F64 ? "F64" : "F32");
}

void validate_router(int64_t T, int64_t E, int64_t K, RouterKind kind, DType logits_dtype) {
  MACHMOE_CHECK(T >= 0 && T <= kMaxIndex, "T is {}, expected 0 .. 2^31 - 1 tokens", T);
  MACHMOE_CHECK(E >= 1 && E <= kMaxIndex, "E is {}, expected at least 1 expert", E);
  MACHMOE_CHECK(K >= 1 && K <= E, "K is {}, expected 1 .. E = {}: a token cannot choose an expert twice", K, E);
  MACHMOE_CHECK(T * K <= kMaxIndex, "T K is {}, expected at most 2^31 - 1 rows: split the batch", T * K);
  MACHMOE_CHECK(kind == RouterKind::TopkSoftmax || kind == RouterKind::SoftmaxTopk || kind == RouterKind::SoftmaxTopkNorm,
                "router is {}, expected a machmoe_router value", static_cast<int>(kind));
  MACHMOE_CHECK(is_float(logits_dtype), "logits_dtype is {}, expected F32, BF16, F16 or F64", static_cast<int>(logits_dtype));
}

void validate_routing(const Shape& s) {
  MACHMOE_CHECK(s.dtype == DType::F32 || s.dtype == DType::BF16 || s.dtype == DType::F64, "dtype is {}, expected F32 (0), BF16 (1) or F64 (3)",
                static_cast<int>(s.dtype));
  MACHMOE_CHECK(s.T >= 0 && s.T <= kMaxIndex, "T is {}, expected 0 .. 2^31 - 1 tokens", s.T);
  MACHMOE_CHECK(s.E >= 1 && s.E <= (int64_t{1} << 20), "E is {}, expected 1 .. 2^20 experts", s.E);
  MACHMOE_CHECK(s.R_cap >= 0 && s.R_cap <= kMaxRows, "row_capacity is {}, expected 0 .. {}: split the batch", s.R_cap, kMaxRows);
  switch (s.kind) {
    case RoutingKind::TopK:
      MACHMOE_CHECK(s.K >= 1 && s.K <= kMaxIndex, "K is {}, expected 1 .. 2^31 - 1 experts per token", s.K);
      MACHMOE_CHECK(s.T == 0 || s.K <= kMaxIndex / s.T, "T K is {} x {}, expected at most 2^31 - 1 rows: split the batch", s.T, s.K);
      MACHMOE_CHECK(s.R_cap == s.T * s.K, "row_capacity is {}, expected T K = {} with top-K routing", s.R_cap, s.T * s.K);
      return;
    case RoutingKind::Lists: return;
    case RoutingKind::Rows:
      MACHMOE_CHECK(s.T == s.R_cap, "T is {}, expected row_capacity = {}: dispatched rows are their own tokens", s.T, s.R_cap);
      return;
  }
  MACHMOE_CHECK(false, "routing_kind is {}, expected TOPK (0), LISTS (1) or ROWS (2)", static_cast<int>(s.kind));
}

void validate(const Shape& s) {
  validate_routing(s);
  MACHMOE_CHECK(s.act.kind >= ActivationKind::SwiGLU && s.act.kind <= ActivationKind::SiLU, "activation is {}, expected a machmoe_activation value",
                static_cast<int>(s.act.kind));
  MACHMOE_CHECK(s.act.limit >= 0.f, "limit is {}, expected 0 (no clamp) or a positive number", s.act.limit);
  MACHMOE_CHECK(s.d >= 8 && s.d % 8 == 0 && s.d <= (int64_t{1} << 24), "d is {}, expected a multiple of 8 in 8 .. 2^24: pad the hidden size", s.d);
  MACHMOE_CHECK(s.n >= 8 && s.n % 8 == 0 && s.n <= (int64_t{1} << 24), "n is {}, expected a multiple of 8 in 8 .. 2^24: pad the intermediate size",
                s.n);
}

void validate(const IndexTopkArgs& p) {
  validate_routing(p.shape);
  MACHMOE_CHECK(p.shape.kind == RoutingKind::TopK, "routing_kind is {}, expected TOPK (0) for routing from top-K ids",
                static_cast<int>(p.shape.kind));
  MACHMOE_CHECK(is_index(p.ids_dtype), "ids_dtype is {}, expected I32 (4) or I64 (5)", static_cast<int>(p.ids_dtype));
  require_rows(p.ids, p.shape.R_cap, "ids");
  check_routing(p.shape, p.out);
}

void validate(const IndexListsArgs& p) {
  validate_routing(p.shape);
  MACHMOE_CHECK(p.shape.kind == RoutingKind::Lists, "routing_kind is {}, expected LISTS (1) for routing from lists", static_cast<int>(p.shape.kind));
  MACHMOE_CHECK(is_index(p.ids_dtype), "ids_dtype is {}, expected I32 (4) or I64 (5)", static_cast<int>(p.ids_dtype));
  require_rows(p.token_ids, p.shape.R_cap, "token_ids");
  require_rows(p.expert_ids, p.shape.R_cap, "expert_ids");
  check_routing(p.shape, p.out);
}

void validate(const IndexRowsArgs& p) {
  validate_routing(p.shape);
  MACHMOE_CHECK(p.shape.kind != RoutingKind::TopK, "routing_kind is TOPK (0), expected LISTS (1) or ROWS (2): top-K metadata comes from its ids");
  check_routing(p.shape, p.out);
}

void validate(const TokenRoundArgs& p) {
  validate_routing(p.shape);
  MACHMOE_CHECK(p.shape.dtype != DType::F64, "dtype is F64, expected F32 or BF16: token rounding works on fp32 scores");
  MACHMOE_CHECK(p.rule >= RoundingRule::NrF && p.rule <= RoundingRule::BalanceF, "rule is {}, expected a machmoe_rounding value",
                static_cast<int>(p.rule));
  MACHMOE_CHECK(p.K >= 1 && p.K <= p.shape.E, "K is {}, expected 1 .. E = {}", p.K, p.shape.E);
  MACHMOE_CHECK(p.tile >= 1 && p.tile <= (int64_t{1} << 20), "tile is {}, expected 1 .. 2^20 rows", p.tile);
  const int64_t capacity = rounded_capacity(p.shape.T, p.shape.E, p.K, p.tile, p.rule);
  MACHMOE_CHECK(p.shape.kind == RoutingKind::Lists && p.shape.R_cap == capacity,
                "row_capacity is {} with routing_kind {}, expected {} with LISTS (1): ask machmoe_rounded_capacity", p.shape.R_cap,
                static_cast<int>(p.shape.kind), capacity);
  require_rows(p.scores, p.shape.T, "scores");
  check_routing(p.shape, p.out);
  require_rows(p.out.expert, p.shape.R_cap, "routing.expert");
}

void validate(const TokenRoundBackwardArgs& p) {
  validate_routing(p.shape);
  MACHMOE_CHECK(p.shape.dtype != DType::F64, "dtype is F64, expected F32 or BF16: token rounding works on fp32 scores");
  MACHMOE_CHECK(p.shape.kind == RoutingKind::Lists, "routing_kind is {}, expected LISTS (1): the layer of machmoe_token_round",
                static_cast<int>(p.shape.kind));
  check_routing(p.shape, p.routing);
  require_rows(p.routing.expert, p.shape.R_cap, "routing.expert");
  if (p.renormalize) require_rows(p.scores, p.shape.T, "scores");
  require_rows(p.dscore, p.shape.R_cap, "dscore");
  require_rows(p.dscores, p.shape.T, "dscores");
}

void validate(const TopkArgs& p) {
  validate_router(p.T, p.E, p.K, p.kind, p.logits_dtype);
  require_rows(p.logits, p.T, "logits");
  require_rows(p.ids, p.T, "ids");
  require_rows(p.weights, p.T, "weights");
  require(p.counts, "counts");
}

void validate(const TopkBackwardArgs& p) {
  validate_router(p.T, p.E, p.K, p.kind, p.logits_dtype);
  require_rows(p.logits, p.T, "logits");
  require_rows(p.ids, p.T, "ids");
  require_rows(p.weights, p.T, "weights");
  require_rows(p.dlogits, p.T, "dlogits");
  if (p.daux) require(p.counts, "counts");
  if (p.dweights) return;
  require_rows(p.ds_parts, p.T, "backward_workspace");
  require_rows(p.inverse, p.T, "routing.inverse");
}

void validate(const UpProjArgs& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  require_rows(p.x, p.shape.T, "x");
  check_w1(p.shape, p.w1_gate, p.w1_up, "w1_gate", "w1_up");
  check_b1(p.shape, p.b1_gate, p.b1_up, "b1_gate", "b1_up");
}

void validate(const DownProjArgs& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  require_rows(p.a, p.shape.R_cap, "workspace");
  require_rows(p.y, p.shape.R_cap, "o");
  check_matrix(p.shape, p.w2, p.shape.d, p.shape.n, "w2");
  check_bias(p.shape, p.b2, p.shape.d, "b2");
}

void validate(const ScoreGradArgs& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  MACHMOE_CHECK(is_float(p.dscore_dtype) && (p.dscore_dtype == DType::F64) == (p.shape.dtype == DType::F64),
                "dscore_dtype is {}, expected F32, BF16 or F16 (F64 with F64 data alone)", static_cast<int>(p.dscore_dtype));
  require_rows(p.ds_parts, p.shape.R_cap, "workspace");
  require_rows(p.dscore, p.shape.R_cap, "dscore");
}

void validate(const AggregateArgs& p) {
  validate(p.shape);
  MACHMOE_CHECK(p.shape.kind != RoutingKind::Rows, "routing_kind is ROWS (2), expected TOPK or LISTS: dispatched rows are not summed");
  if (p.weighted) check_scored_routing(p.shape, p.routing);
  else check_routing(p.shape, p.routing);
  require_rows(p.y, p.shape.R_cap, "workspace");
  require_rows(p.out, p.shape.T, p.weighted ? "o" : "dx");
  check_bias(p.shape, p.b2, p.shape.d, "b2");
}

void validate(const DownProjBwdArgs& p) {
  validate(p.shape);
  check_scored_routing(p.shape, p.routing);
  require_rows(p.d_o, p.shape.T, "d_o");
  require_rows(p.h, p.shape.R_cap, "h");
  check_matrix(p.shape, p.w2, p.shape.d, p.shape.n, "w2");
  check_bias(p.shape, p.b2, p.shape.d, "b2");
  require_rows(p.dh, p.shape.R_cap, "workspace");
}

void validate(const UpProjBwdArgs& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  check_w1(p.shape, p.w1_gate, p.w1_up, "w1_gate", "w1_up");
  require_rows(p.dx_rows, p.shape.R_cap, "dx");
}

void validate(const WeightGradW2Args& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  check_grad_dtype(p.shape, p.out_dtype);
  require_rows(p.d_o, p.shape.T, "d_o");
  check_matrix(p.shape, p.dw2, p.shape.d, p.shape.n, "dw2");
}

void validate(const WeightGradW1Args& p) {
  validate(p.shape);
  check_routing(p.shape, p.routing);
  check_grad_dtype(p.shape, p.out_dtype);
  require_rows(p.x, p.shape.T, "x");
  check_w1(p.shape, p.dw1_gate, p.dw1_up, "dw1_gate", "dw1_up");
}

void validate(const BiasGradArgs& p) {
  validate(p.shape);
  if (p.db2.base) check_scored_routing(p.shape, p.routing);
  else check_routing(p.shape, p.routing);
  check_grad_dtype(p.shape, p.out_dtype);
  check_b1(p.shape, p.db1_gate, p.db1_up, "db1_gate", "db1_up");
  check_bias(p.shape, p.db2, p.shape.d, "db2");
  require_rows(p.d_o, p.shape.T, "d_o");
}

}  // namespace machmoe
