// The whole layer through the C ABI, over the case table: the contracts of docs/design.md.
#include "layer.h"

namespace machmoe::test {
namespace {

void expect_close(const char* what, const Tensor& actual, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  EXPECT_LE(relative_error(actual.values(), expected), tolerance) << what;
}
void expect_matches(const Problem& p, const Results& r, const Reference& ref) {
  const double tol = tolerance(p.shape.dtype);
  expect_close("O", r.o, ref.o, tol);
  expect_close("dX", r.dx, ref.dx, tol);
  expect_close("dS", r.dscore, ref.ds, tol);
  expect_close("dW1 gate", r.dw1_gate, ref.dw1_gate, tol);
  expect_close("dW1 up", r.dw1_up, ref.dw1_up, tol);
  expect_close("dW2", r.dw2, ref.dw2, tol);
  if (!p.c.bias) return;
  expect_close("db1 gate", r.db1_gate, ref.db1_gate, tol);
  expect_close("db1 up", r.db1_up, ref.db1_up, tol);
  expect_close("db2", r.db2, ref.db2, tol);
}

class LayerTest : public testing::TestWithParam<std::tuple<Case, DType>> {
 protected:
  Problem problem(uint64_t seed = 1) const { return make_problem(std::get<0>(GetParam()), std::get<1>(GetParam()), seed); }
};

TEST_P(LayerTest, MatchesTheDefinition) {
  const Problem p = problem();
  Results r;
  ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, r));
  expect_matches(p, r, reference(p, false));
}

TEST_P(LayerTest, BitsDoNotDependOnTheThreadCountNorOnRecompute) {
  const Problem p = problem(2);
  Results one;
  machmoe_set_num_threads(1);
  ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, one));
  for (int threads : {2, 3}) {
    Results r;
    machmoe_set_num_threads(threads);
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {.recompute = threads == 3}, r));
    EXPECT_TRUE(r == one) << threads << " threads";
  }
  machmoe_set_num_threads(0);
}

std::string case_name(const testing::TestParamInfo<std::tuple<Case, DType>>& test) {
  const char* const dtypes[] = {"F32", "BF16", "F16", "F64"};
  return std::get<0>(test.param).name + "_" + dtypes[static_cast<int>(std::get<1>(test.param))];
}
INSTANTIATE_TEST_SUITE_P(CaseTable, LayerTest,
                         testing::Combine(testing::ValuesIn(case_table()), testing::Values(DType::F32, DType::BF16, DType::F64)), case_name);

TEST(Layer, AddendIsAddedToOAndDx) {
  for (RoutingKind kind : {RoutingKind::TopK, RoutingKind::Lists}) {
    const Problem p = make_problem({.name = "Addend", .pattern = Pattern::Dropped, .kind = kind, .bias = true}, DType::BF16);
    Results r;
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {.addend = true}, r));
    expect_matches(p, r, reference(p, true));
  }
}

TEST(Layer, LayoutsOfW1AreBitEqual) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    Results concatenated, r;
    ASSERT_NO_FATAL_FAILURE(run_layer(make_problem({.name = "Layouts", .bias = true}, dtype), {}, concatenated));
    for (Layout layout : {Layout::Interleaved, Layout::TwoTensors}) {
      ASSERT_NO_FATAL_FAILURE(run_layer(make_problem({.name = "Layouts", .layout = layout, .bias = true}, dtype), {}, r));
      EXPECT_TRUE(r == concatenated);
    }
  }
}

TEST(Layer, TheRoutingMayBeMadeByTheForward) {
  for (const Case& c : {Case{.name = "Usual"}, Case{.name = "Small", .d = 8, .n = 8, .E = 300, .K = 3}, Case{.name = "Empty", .T = 0}}) {
    const Problem p = make_problem(c, DType::BF16);
    Results before, within;
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, before));
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {.routing_in_forward = true}, within));
    EXPECT_TRUE(before == within) << c.name;
  }
}

TEST(Layer, PhasesCalledApartGiveTheBitsOfOneCall) {
  constexpr uint32_t kActivation = MACHMOE_PHASE_ACTIVATION, kWeight = MACHMOE_PHASE_WEIGHT, kInput = MACHMOE_PHASE_INPUT;
  for (RoutingKind kind : {RoutingKind::TopK, RoutingKind::Rows}) {
    const Problem p = make_problem({.name = "Phases", .kind = kind, .bias = true}, DType::BF16);
    Results at_once, r;
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, at_once));
    for (const Options& options : {Options{}, Options{.recompute = true}, Options{.dh_over_h = true}})
      for (const auto& phases : {std::vector{kActivation | kWeight | kInput},
                                 {kActivation, kWeight, kInput},
                                 {kActivation, kInput, kWeight},
                                 {kActivation | kInput, kWeight},
                                 {kActivation, kWeight | kInput}}) {
        Options apart = options;
        apart.phases = phases;
        ASSERT_NO_FATAL_FAILURE(run_layer(p, apart, r));
        EXPECT_TRUE(r == at_once);
      }
  }
}

TEST(Layer, DXTildeLiesOverWhatHasBeenRead) {
  const Problem p = make_problem({.name = "Phases"}, DType::BF16);
  const machmoe_layer layer = layer_of(p.shape);
  const auto bytes = [&](uint32_t phases, bool with_dh = false) {
    size_t size = 0;
    EXPECT_EQ(MACHMOE_OK, machmoe_backward_workspace_bytes(&layer, with_dh, phases, &size));
    return static_cast<int64_t>(size);
  };
  const auto a_prime = p.shape.R_cap * p.shape.n * 2, dx_rows = p.shape.R_cap * p.shape.d * 2, dh = 2 * a_prime, ds = p.shape.R_cap * 4;
  EXPECT_GE(bytes(MACHMOE_PHASE_INPUT), bytes(MACHMOE_PHASE_WEIGHT) + dx_rows);
  EXPECT_EQ(bytes(MACHMOE_PHASE_WEIGHT | MACHMOE_PHASE_INPUT), bytes(MACHMOE_PHASE_ALL));
  EXPECT_LE(bytes(MACHMOE_PHASE_ALL), bytes(MACHMOE_PHASE_INPUT) - std::min(a_prime, dx_rows));
  EXPECT_LE(bytes(MACHMOE_PHASE_ALL, true), bytes(MACHMOE_PHASE_ALL) - dh);
  ASSERT_LE(dx_rows, ds + a_prime);
  EXPECT_EQ(bytes(MACHMOE_PHASE_ALL, true), bytes(MACHMOE_PHASE_ACTIVATION, true));
}

TEST(Layer, WeightGradientsAccumulateInFp32) {
  const Problem p = make_problem({.name = "Accumulate", .E = 7, .pattern = Pattern::EvenExperts, .bias = true}, DType::BF16);
  Reference ref = reference(p, false);
  for (auto* g : {&ref.dw1_gate, &ref.dw1_up, &ref.dw2, &ref.db1_gate, &ref.db1_up, &ref.db2})
    for (double& v : *g) v += 1;
  Results r;
  ASSERT_NO_FATAL_FAILURE(run_layer(p, {.accumulate = true, .grad_dtype = DType::F32}, r));
  expect_matches(p, r, ref);
}

TEST(Layer, ANanOfOneExpertStaysInItsTokens) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    Problem p = make_problem({.name = "NaN", .bias = true}, dtype);
    Results clean, dirty;
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, clean));
    const int64_t poisoned = 2, nd = p.shape.n * p.shape.d;
    for (int64_t i = 0; i < nd; i++) p.w1_up.set(static_cast<size_t>(poisoned * nd + i), NAN);
    ASSERT_NO_FATAL_FAILURE(run_layer(p, {}, dirty));
    std::vector<bool> touched(static_cast<size_t>(p.shape.T));
    for (const Pair& pair : p.pairs)
      if (pair.expert == poisoned) touched[static_cast<size_t>(pair.token)] = true;
    for (int64_t i = 0; i < p.shape.T * p.shape.d; i++) {
      const auto at = static_cast<size_t>(i);
      if (touched[static_cast<size_t>(i / p.shape.d)]) continue;
      ASSERT_EQ(clean.o.get(at), dirty.o.get(at));
      ASSERT_EQ(clean.dx.get(at), dirty.dx.get(at));
    }
    for (int64_t i = 0; i < p.shape.E * nd; i++) {
      const auto at = static_cast<size_t>(i);
      if (i / nd == poisoned) continue;
      ASSERT_EQ(clean.dw1_up.get(at), dirty.dw1_up.get(at));
      ASSERT_EQ(clean.dw2.get(at), dirty.dw2.get(at));
    }
  }
}

// 2 T d + 4 T K n bytes and a little: H, and metadata of at most 16 bytes a row, 64 an expert and 64 KiB.
TEST(Layer, SavedMetadataIsWithinTheContract) {
  for (int64_t n : {64, 128, 256, 512, 1024}) {
    const int64_t K = 1024 / n * 2, E = 8 * K, T = 4096;
    for (int32_t kind : {MACHMOE_TOPK, MACHMOE_LISTS, MACHMOE_ROWS}) {
      const machmoe_layer layer{.struct_size = sizeof(machmoe_layer),
                                .device = MACHMOE_CPU,
                                .dtype = MACHMOE_BF16,
                                .activation = MACHMOE_SWIGLU,
                                .routing_kind = kind,
                                .alpha = 0,
                                .limit = 0,
                                .T = kind == MACHMOE_ROWS ? T * K : T,
                                .d = 512,
                                .n = n,
                                .E = E,
                                .K = K,
                                .row_capacity = T * K};
      size_t bytes = 0, scratch = 0;
      ASSERT_EQ(MACHMOE_OK, machmoe_routing_bytes(&layer, 0, &bytes, &scratch)) << machmoe_last_error();
      EXPECT_LE(bytes, static_cast<size_t>(16 * T * K + 64 * E + 64 * 1024));
    }
  }
}

}  // namespace
}  // namespace machmoe::test
