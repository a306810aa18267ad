// Each experts op of the CPU backend by itself, against its line in src/ops.h in fp64. The inputs of an op are fresh random tensors and
// not what the op before it left, so that an error stands where it is made. On oneDNN and on plain loops.
#include <map>

#include "backend.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "layer.h"

namespace machmoe::test {
namespace {

using cpu::GemmEngine;

enum class Axis { Row, Token, Slot, Expert };  // what the leading dimension of an output counts
struct Output {
  Axis axis;
  Tensor values;
  bool operator==(const Output&) const = default;
};
using Outputs = std::map<std::string, Output>;
using Expected = std::map<std::string, std::vector<double>>;

struct Inputs {
  Problem p;
  RoutingBuffer routing;
  Tensor h, dh;       // [R_cap, planes, n]
  Tensor a, a_prime;  // [R_cap, n]
  Tensor y;           // [R_cap, d]
  Tensor ds_parts;    // [kParts][R_cap]

  static constexpr int64_t kParts = 3;
  int64_t rows() const { return routing.views.offsets[p.shape.E]; }
  Routing views() const {
    const machmoe_routing& v = routing.views;
    return {v.slot, v.token, v.expert, v.score, v.counts, v.offsets, v.token_offsets, v.inverse, nullptr};
  }
  int64_t token(int64_t row) const { return row_source(p.shape, views())[row]; }
  int64_t expert(int64_t row) const {
    return std::upper_bound(routing.views.offsets, routing.views.offsets + p.shape.E + 1, row) - routing.views.offsets - 1;
  }
};

void make_inputs(const Case& c, DType dtype, Inputs& in) {
  in.p = make_problem(c, dtype);
  ASSERT_NO_FATAL_FAILURE(build_routing(in.p, in.routing));
  const Shape& s = in.p.shape;
  Random random(7);
  in.h = random.tensor(dtype, s.R_cap * s.planes() * s.n);
  for (size_t i = 0; i < in.h.size(); i++)  // the reference differentiates in steps of 1e-5: H keeps off the kink of ReLU
    if (std::abs(in.h.get(i)) < 1e-4) in.h.set(i, 1e-4);
  in.dh = random.tensor(dtype, s.R_cap * s.planes() * s.n);
  in.a = random.tensor(dtype, s.R_cap * s.n);
  in.a_prime = random.tensor(dtype, s.R_cap * s.n);
  in.y = random.tensor(dtype, s.R_cap * s.d);
  in.ds_parts = random.tensor(s.accum(), Inputs::kParts * s.R_cap);
}

ConstWeight view(const machmoe_matrix& m) { return {m.base, m.row_stride, m.expert_stride}; }
ConstBias view(const machmoe_vector& v) { return {v.base, v.stride, v.expert_stride}; }
MutableWeight mutable_view(const machmoe_matrix& m) { return {m.base, m.row_stride, m.expert_stride}; }
MutableBias mutable_view(const machmoe_vector& v) { return {v.base, v.stride, v.expert_stride}; }

struct RunOptions {
  GemmEngine engine = GemmEngine::OneDNN;
  int threads = 2;
  std::optional<DType> grad_dtype = std::nullopt;  // else the layer's
  std::optional<double> accumulate_on = std::nullopt;
  bool dh_over_h = false;
};

// All nine ops. Outputs start as NaN; rows past R, which only Rows defines, come back as zero.
Outputs run_ops(const Inputs& in, const RunOptions& o = {}) {
  cpu::set_gemm_engine(o.engine);
  cpu::set_num_threads(o.threads);
  const Backend& backend = cpu_backend();
  const Shape& s = in.p.shape;
  const Routing r = in.views();
  const WeightSet weights = weights_of(in.p);
  const machmoe_weights& w = weights.views;
  const bool rows_kind = s.kind == RoutingKind::Rows;
  const int64_t R = in.rows();

  Outputs out;
  const auto fresh = [&](const char* name, Axis axis, DType dtype, int64_t count) {
    return (out[name] = {axis, Tensor(dtype, static_cast<size_t>(count))}).values.data();
  };
  const auto per_row = [&](const char* name, int64_t width) { return fresh(name, Axis::Row, s.dtype, s.R_cap * width); };

  backend.up_proj(
      {s, r, in.p.x.data(), view(w.w1_gate), view(w.w1_up), view(w.b1_gate), view(w.b1_up), per_row("H", s.planes() * s.n), per_row("A", s.n)}, {});
  backend.down_proj({s, r, in.a.data(), view(w.w2), view(w.b2), per_row("Y", s.d)}, {});
  void* dh = per_row("dH", s.planes() * s.n);
  if (o.dh_over_h) std::copy_n(static_cast<const std::byte*>(in.h.data()), in.h.size() * size_of(s.dtype), static_cast<std::byte*>(dh));
  backend.down_proj_bwd({s, r, in.p.d_o.data(), view(w.w2), view(w.b2), o.dh_over_h ? dh : in.h.data(), dh, per_row("A'", s.n),
                         fresh("dS part", Axis::Row, s.accum(), s.R_cap)},
                        {});
  backend.up_proj_bwd({s, r, in.dh.data(), view(w.w1_gate), view(w.w1_up), per_row("dX~", s.d)}, {});
  backend.score_grad({s, r, in.ds_parts.data(), Inputs::kParts, fresh("dS", rows_kind ? Axis::Row : Axis::Slot, s.accum(), s.R_cap), s.accum()}, {});
  if (!rows_kind) {
    backend.aggregate({s, r, in.y.data(), true, view(w.b2), in.p.addend.data(), fresh("O", Axis::Token, s.dtype, s.T * s.d)}, {});
    backend.aggregate({s, r, in.y.data(), false, {}, nullptr, fresh("dX", Axis::Token, s.dtype, s.T * s.d)}, {});
  }

  const DType grad = o.grad_dtype.value_or(s.dtype);
  const bool accumulate = o.accumulate_on.has_value();
  WeightSet grads = WeightSet::make(s, in.p.c.layout, in.p.c.bias, grad);
  for (Tensor* t : {&grads.w1, &grads.w1_second, &grads.w2, &grads.b1, &grads.b1_second, &grads.b2})
    for (size_t i = 0; accumulate && i < t->size(); i++) t->set(i, *o.accumulate_on);
  const machmoe_weights& g = grads.views;
  backend.weight_grad_w2({s, r, in.p.d_o.data(), in.a_prime.data(), mutable_view(g.w2), grad, accumulate}, {});
  backend.weight_grad_w1({s, r, in.p.x.data(), in.dh.data(), mutable_view(g.w1_gate), mutable_view(g.w1_up), grad, accumulate}, {});
  if (in.p.c.bias)
    backend.bias_grad({s, r, in.dh.data(), in.p.d_o.data(), mutable_view(g.b1_gate), mutable_view(g.b1_up), mutable_view(g.b2), grad, accumulate},
                      {});
  const auto keep = [&](const char* name, const machmoe_matrix& m, int64_t rows, int64_t cols) {
    if (m.base) out[name] = {Axis::Expert, gather(m, grad, s.E, rows, cols)};
  };
  keep("dW1 gate", g.w1_gate, s.n, s.d), keep("dW1 up", g.w1_up, s.n, s.d), keep("dW2", g.w2, s.d, s.n);
  keep("db1 gate", as_matrix(g.b1_gate), s.n, 1), keep("db1 up", as_matrix(g.b1_up), s.n, 1), keep("db2", as_matrix(g.b2), s.d, 1);

  for (auto& [name, output] : out) {
    const bool defined = rows_kind && (name == "Y" || name == "dX~" || name == "dS");
    const size_t width = s.R_cap ? output.values.size() / static_cast<size_t>(s.R_cap) : 0;
    for (size_t i = static_cast<size_t>(R) * width; output.axis == Axis::Row && !defined && i < output.values.size(); i++) output.values.set(i, 0);
  }
  cpu::set_gemm_engine(GemmEngine::OneDNN);
  cpu::set_num_threads(0);
  return out;
}

// The definitions of src/ops.h, a row at a time.
Expected expected_of(const Inputs& in) {
  const Shape& s = in.p.shape;
  const bool gated = s.act.gated(), bias = in.p.c.bias, rows_kind = s.kind == RoutingKind::Rows;
  const int64_t d = s.d, n = s.n, planes = s.planes();
  const auto x = in.p.x.values(), d_o = in.p.d_o.values(), w2 = in.p.w2.values(), b2 = in.p.b2.values(), h = in.h.values(), dh = in.dh.values(),
             a = in.a.values(), a_prime = in.a_prime.values(), y = in.y.values(), parts = in.ds_parts.values();
  const std::vector<double> w1[] = {(gated ? in.p.w1_gate : in.p.w1_up).values(), in.p.w1_up.values()};  // by plane; the first one alone without gate
  const std::vector<double> b1[] = {(gated ? in.p.b1_gate : in.p.b1_up).values(), in.p.b1_up.values()};
  const char* const dw1[] = {gated ? "dW1 gate" : "dW1 up", "dW1 up"};
  const char* const db1[] = {gated ? "db1 gate" : "db1 up", "db1 up"};

  Expected out;
  const auto zeros = [&](const char* name, int64_t count) { out[name].assign(static_cast<size_t>(count), 0); };
  zeros("H", s.R_cap * planes * n), zeros("A", s.R_cap * n), zeros("Y", s.R_cap * d), zeros("dH", s.R_cap * planes * n), zeros("A'", s.R_cap * n);
  zeros("dX~", s.R_cap * d), zeros("dS part", s.R_cap), zeros("dS", s.R_cap), zeros("dW2", s.E * d * n);
  for (int64_t plane = 0; plane < planes; plane++) zeros(dw1[plane], s.E * n * d);
  for (int64_t plane = 0; bias && plane < planes; plane++) zeros(db1[plane], s.E * n);
  if (bias) zeros("db2", s.E * d);
  if (!rows_kind) out["O"] = in.p.addend.values(), zeros("dX", s.T * d);

  const auto product = [](const double* left, const double* right, int64_t count, int64_t step) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += left[i] * right[i * step];
    return sum;
  };
  const auto activation = [&](const double* row, int64_t i, double& value, double& d_gate, double& d_up) {
    reference_activation(s.act, gated ? row[i] : 0, row[(planes - 1) * n + i], value, d_gate, d_up);
  };
  double value = 0, d_gate = 0, d_up = 0;
  for (int64_t row = 0; row < in.rows(); row++) {
    const int64_t e = in.expert(row), t = in.token(row), slot = s.kind == RoutingKind::TopK ? in.routing.order[static_cast<size_t>(row)] : row;
    const int64_t place = s.kind == RoutingKind::TopK ? slot : row;
    const void* scores = in.routing.views.score;
    const double score = s.accum() == DType::F64 ? static_cast<const double*>(scores)[place] : static_cast<const float*>(scores)[place];
    const double *xt = &x[size_t(t * d)], *dot = &d_o[size_t(t * d)], *hr = &h[size_t(row * planes * n)], *dhr = &dh[size_t(row * planes * n)];
    double *H = &out["H"][size_t(row * planes * n)], *dH = &out["dH"][size_t(row * planes * n)], &ds = out["dS part"][size_t(row)];
    for (int64_t plane = 0; plane < planes; plane++)
      for (int64_t i = 0; i < n; i++) {
        const size_t at = size_t(e * n + i);
        H[plane * n + i] = (bias ? b1[plane][at] : 0) + product(xt, &w1[plane][at * size_t(d)], d, 1);
        if (bias) out[db1[plane]][at] += dhr[plane * n + i];
        double *dw = &out[dw1[plane]][at * size_t(d)], *dx_row = &out["dX~"][size_t(row * d)];
        for (int64_t j = 0; j < d; j++) {
          dw[j] += dhr[plane * n + i] * xt[j];
          dx_row[j] += dhr[plane * n + i] * w1[plane][at * size_t(d) + size_t(j)];
        }
      }
    for (int64_t i = 0; i < n; i++) {
      const double da = product(dot, &w2[size_t(e * d * n + i)], d, n);
      activation(H, i, out["A"][size_t(row * n + i)], d_gate, d_up);
      activation(hr, i, value, d_gate, d_up);
      if (gated) dH[i] = d_gate * score * da;
      dH[(planes - 1) * n + i] = d_up * score * da;
      out["A'"][size_t(row * n + i)] = score * value;
      ds += da * value;
    }
    for (int64_t j = 0; j < d; j++) {
      const size_t at = size_t(e * d + j);
      const double b = bias ? b2[at] : 0, y_row = product(&a[size_t(row * n)], &w2[at * size_t(n)], n, 1);
      out["Y"][size_t(row * d + j)] = rows_kind ? score * (y_row + b) : y_row;
      ds += dot[j] * b;
      if (bias) out["db2"][at] += score * dot[j];
      for (int64_t i = 0; i < n; i++) out["dW2"][at * size_t(n) + size_t(i)] += dot[j] * a_prime[size_t(row * n + i)];
      if (rows_kind) continue;
      out["O"][size_t(t * d + j)] += score * (y[size_t(row * d + j)] + b);
      out["dX"][size_t(t * d + j)] += y[size_t(row * d + j)];
    }
    for (int64_t part = 0; part < Inputs::kParts; part++) out["dS"][size_t(slot)] += parts[size_t(part * s.R_cap + row)];
  }
  return out;
}

void expect_close(const Outputs& actual, const Expected& expected, double tol) {
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, values] : expected) {
    ASSERT_TRUE(actual.count(name)) << name;
    ASSERT_EQ(actual.at(name).values.size(), values.size()) << name;
    EXPECT_LE(relative_error(actual.at(name).values.values(), values), tol) << name;
  }
}

constexpr std::pair<const char*, GemmEngine> kEngines[] = {{"oneDNN", GemmEngine::OneDNN}, {"plain loops", GemmEngine::Plain}};

class ExpertsOps : public testing::TestWithParam<std::tuple<Case, DType>> {
 protected:
  void SetUp() override { make_inputs(std::get<0>(GetParam()), std::get<1>(GetParam()), in); }
  Inputs in;
};

TEST_P(ExpertsOps, MatchTheirDefinitions) {
  const Expected expected = expected_of(in);
  for (const auto& [name, engine] : kEngines) {
    SCOPED_TRACE(name);
    expect_close(run_ops(in, {.engine = engine}), expected, tolerance(in.p.shape.dtype));
  }
}

TEST_P(ExpertsOps, AreBitEqualForEveryThreadCount) {
  for (const auto& [name, engine] : kEngines) {
    const Outputs one = run_ops(in, {.engine = engine, .threads = 1});
    for (int threads : {2, 3}) EXPECT_TRUE(run_ops(in, {.engine = engine, .threads = threads}) == one) << name << ", " << threads << " threads";
  }
}

TEST_P(ExpertsOps, DHMayTakeThePlaceOfH) { EXPECT_TRUE(run_ops(in, {.dh_over_h = true}) == run_ops(in)); }

std::string case_name(const testing::TestParamInfo<std::tuple<Case, DType>>& test) {
  const char* const dtypes[] = {"F32", "BF16", "F16", "F64"};
  return std::get<0>(test.param).name + "_" + dtypes[static_cast<int>(std::get<1>(test.param))];
}
INSTANTIATE_TEST_SUITE_P(CaseTable, ExpertsOps,
                         testing::Combine(testing::ValuesIn(case_table()), testing::Values(DType::F32, DType::BF16, DType::F64)), case_name);

TEST(ExpertsOp, LayoutsOfW1AreBitEqual) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (const auto& [name, engine] : kEngines) {
      Inputs in;
      ASSERT_NO_FATAL_FAILURE(make_inputs({.name = "Layouts", .bias = true}, dtype, in));
      const Outputs concatenated = run_ops(in, {.engine = engine});
      for (Layout layout : {Layout::Interleaved, Layout::TwoTensors}) {
        in.p.c.layout = layout;
        EXPECT_TRUE(run_ops(in, {.engine = engine}) == concatenated) << name;
      }
    }
}

// Longer than one token block: 600 rows of one expert, the blocks added in order.
TEST(ExpertsOp, LongReductionsMatch) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    Inputs in;
    ASSERT_NO_FATAL_FAILURE(
        make_inputs({.name = "Long", .T = 600, .d = 40, .n = 136, .E = 3, .K = 1, .pattern = Pattern::OneExpert, .bias = true}, dtype, in));
    for (const auto& [name, engine] : kEngines) {
      SCOPED_TRACE(name);
      expect_close(run_ops(in, {.engine = engine}), expected_of(in), tolerance(dtype));
    }
  }
}

TEST(ExpertsOp, GradientsAreAddedToAnAccumulator) {
  for (auto [dtype, grad] : {std::pair{DType::F32, DType::F32}, {DType::BF16, DType::F32}, {DType::BF16, DType::BF16}, {DType::F64, DType::F64}}) {
    Inputs in;
    ASSERT_NO_FATAL_FAILURE(make_inputs({.name = "Accumulate", .E = 7, .pattern = Pattern::EvenExperts, .bias = true}, dtype, in));
    Expected expected = expected_of(in);
    for (auto& [name, values] : expected)
      for (double& v : values) v += name.starts_with("dW") || name.starts_with("db") ? 3 : 0;
    expect_close(run_ops(in, {.grad_dtype = grad, .accumulate_on = 3}), expected, tolerance(dtype));
  }
}

// Bit by bit: experts without rows hold zeros, or keep what the accumulator held.
TEST(ExpertsOp, ExpertsWithoutRowsGetZerosOrKeepTheAccumulator) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (std::optional<double> start : {std::optional<double>(), std::optional(3.0)}) {
      Inputs in;
      ASSERT_NO_FATAL_FAILURE(make_inputs({.name = "Empty", .E = 7, .pattern = Pattern::EvenExperts, .bias = true}, dtype, in));
      const Outputs out = run_ops(in, {.grad_dtype = DType::F32, .accumulate_on = start});
      for (const auto& [name, output] : out) {
        const size_t width = output.values.size() / 7;
        for (size_t i = 0; output.axis == Axis::Expert && i < output.values.size(); i++) {
          if (i / width % 2 == 0) continue;
          ASSERT_EQ(output.values.get(i), start.value_or(0)) << name;
        }
      }
    }
}

// Everything that belongs to one expert is NaN or infinite: its weights, its rows and, with K = 1, its tokens. 1, 127, 128 and 129 rows.
TEST(ExpertsOp, ANanOrInfinityOfOneExpertReachesNoOther) {
  const Case c{.name = "Isolation", .T = 385, .d = 40, .n = 24, .E = 6, .K = 1, .pattern = Pattern::TileEdges, .bias = true};
  for (DType dtype : {DType::F32, DType::BF16})
    for (const auto& [engine_name, engine] : kEngines) {
      Inputs clean;
      ASSERT_NO_FATAL_FAILURE(make_inputs(c, dtype, clean));
      const Outputs before = run_ops(clean, {.engine = engine});
      for (int64_t poisoned = 0; poisoned < 4; poisoned++) {
        Inputs in;
        ASSERT_NO_FATAL_FAILURE(make_inputs(c, dtype, in));
        const auto owner = [&](Axis axis, size_t i) {
          return axis == Axis::Row ? in.expert(int64_t(i)) : axis == Axis::Expert ? int64_t(i) : int64_t(in.p.expert_ids[i]);  // K = 1: slot = token
        };
        const auto poison = [&](Tensor& t, Axis axis) {
          const size_t width = t.size() / size_t(axis == Axis::Expert ? c.E : c.T);
          for (size_t i = 0; i < t.size(); i++)
            if (owner(axis, i / width) == poisoned) t.set(i, i % 2 ? NAN : INFINITY);
        };
        for (Tensor* t : {&in.p.w1_gate, &in.p.w1_up, &in.p.w2, &in.p.b1_gate, &in.p.b1_up, &in.p.b2}) poison(*t, Axis::Expert);
        for (Tensor* t : {&in.h, &in.dh, &in.a, &in.a_prime, &in.y}) poison(*t, Axis::Row);
        for (Tensor* t : {&in.p.x, &in.p.d_o, &in.p.addend}) poison(*t, Axis::Token);
        for (const auto& [name, output] : run_ops(in, {.engine = engine})) {
          const Tensor& expected = before.at(name).values;
          const size_t width = expected.size() / size_t(output.axis == Axis::Expert ? c.E : c.T);
          for (size_t i = 0; i < expected.size(); i++) {
            if (owner(output.axis, i / width) == poisoned) continue;
            ASSERT_EQ(output.values.get(i), expected.get(i))
                << name << " of expert " << owner(output.axis, i / width) << ", poisoned " << poisoned << ", " << engine_name;
          }
        }
      }
    }
}

TEST(ExpertsOp, HAndAAreOptional) {
  for (const bool store_h : {false, true}) {
    Inputs in;
    ASSERT_NO_FATAL_FAILURE(make_inputs({.name = "Optional", .bias = true}, DType::BF16, in));
    const Outputs both = run_ops(in);
    const Shape& s = in.p.shape;
    const WeightSet weights = weights_of(in.p);
    const machmoe_weights& w = weights.views;
    Tensor alone(s.dtype, both.at(store_h ? "H" : "A").values.size());
    cpu_backend().up_proj({s, in.views(), in.p.x.data(), view(w.w1_gate), view(w.w1_up), view(w.b1_gate), view(w.b1_up),
                           store_h ? alone.data() : nullptr, store_h ? nullptr : alone.data()},
                          {});
    EXPECT_TRUE(alone == both.at(store_h ? "H" : "A").values);
  }
}

}  // namespace
}  // namespace machmoe::test
