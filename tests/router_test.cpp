// The router against its definition in fp64: selection, weights, load-balance loss, and gradients by finite differences.
#include <gmock/gmock.h>

#include "layer.h"

namespace machmoe::test {
namespace {

struct Routed {
  std::vector<int32_t> ids, counts;
  Tensor weights, aux;
};
struct RouterCase {
  int64_t T, E, K;
  int32_t router;
  DType dtype;
};

machmoe_route descriptor(const RouterCase& c, const Tensor& logits, Routed& out) {
  const DType accum = c.dtype == DType::F64 ? DType::F64 : DType::F32;
  const auto slots = static_cast<size_t>(c.T * c.K);
  out.ids.assign(slots, -7);
  out.counts.assign(static_cast<size_t>(c.E), -7);
  out.weights = Tensor(accum, slots);
  out.aux = Tensor(accum, size_t{1});
  machmoe_route r{};
  r.struct_size = sizeof r;
  r.router = c.router;
  r.logits_dtype = static_cast<int32_t>(c.dtype);
  r.T = c.T, r.E = c.E, r.K = c.K;
  r.logits = logits.data();
  r.ids = out.ids.data(), r.weights = out.weights.data(), r.counts = out.counts.data(), r.aux = out.aux.data();
  return r;
}
Routed route(const RouterCase& c, const Tensor& logits) {
  Routed out;
  const machmoe_route r = descriptor(c, logits, out);
  EXPECT_EQ(MACHMOE_OK, machmoe_route_forward(&r, nullptr, 0, nullptr)) << machmoe_last_error();
  return out;
}

class RouterTest : public testing::TestWithParam<RouterCase> {};

TEST_P(RouterTest, SelectsTheLargestAndWeighsThem) {
  const RouterCase c = GetParam();
  const Tensor logits = Random(3).tensor(c.dtype, c.T * c.E, 2);
  const Routed out = route(c, logits);
  std::vector<int32_t> counts(static_cast<size_t>(c.E), 0);
  std::vector<double> weights, mean(static_cast<size_t>(c.E), 0);
  for (int64_t t = 0; t < c.T; t++) {
    const auto logit = [&](int64_t e) { return logits.get(static_cast<size_t>(t * c.E + e)); };
    std::vector<int32_t> order(static_cast<size_t>(c.E));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
    double all = 0, selected = 0;
    for (int64_t e = 0; e < c.E; e++) all += std::exp(logit(e));
    for (int64_t e = 0; e < c.E; e++) mean[static_cast<size_t>(e)] += std::exp(logit(e)) / all / double(c.T);
    for (int64_t k = 0; k < c.K; k++) selected += std::exp(logit(order[static_cast<size_t>(k)]));
    for (int64_t k = 0; k < c.K; k++) {
      const int32_t e = order[static_cast<size_t>(k)];
      ASSERT_EQ(out.ids[static_cast<size_t>(t * c.K + k)], e);
      counts[static_cast<size_t>(e)]++;
      weights.push_back(std::exp(logit(e)) / (c.router == MACHMOE_SOFTMAX_TOPK ? all : selected));
    }
  }
  EXPECT_EQ(out.counts, counts);
  EXPECT_LE(relative_error(out.weights.values(), weights), 1e-6);
  double aux = 0;
  for (int64_t e = 0; e < c.E; e++) aux += double(c.E) * counts[static_cast<size_t>(e)] / double(c.T * c.K) * mean[static_cast<size_t>(e)];
  EXPECT_NEAR(out.aux.get(0), aux, 1e-5);
}

TEST_P(RouterTest, BitsDoNotDependOnTheThreadCount) {
  const RouterCase c = GetParam();
  const Tensor logits = Random(4).tensor(c.dtype, c.T * c.E);
  machmoe_set_num_threads(1);
  const Routed one = route(c, logits);
  for (int threads : {2, 3}) {
    machmoe_set_num_threads(threads);
    const Routed out = route(c, logits);
    EXPECT_EQ(out.ids, one.ids);
    EXPECT_TRUE(out.weights == one.weights && out.aux == one.aux);
  }
  machmoe_set_num_threads(0);
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, RouterTest,
    testing::Values(RouterCase{600, 16, 4, MACHMOE_TOPK_SOFTMAX, DType::F32}, RouterCase{600, 16, 4, MACHMOE_SOFTMAX_TOPK, DType::F32},
                    RouterCase{600, 16, 4, MACHMOE_SOFTMAX_TOPK_NORM, DType::F32}, RouterCase{33, 7, 7, MACHMOE_SOFTMAX_TOPK, DType::BF16},
                    RouterCase{33, 129, 1, MACHMOE_TOPK_SOFTMAX, DType::F16}, RouterCase{5, 1, 1, MACHMOE_SOFTMAX_TOPK, DType::F64}));

TEST(Router, TiesGoToTheLowerExpert) {
  const Routed out = route({1, 5, 3, MACHMOE_TOPK_SOFTMAX, DType::F32}, Tensor(DType::F32, std::vector<double>{1, 2, 1, 2, 1}));
  EXPECT_THAT(out.ids, testing::ElementsAre(1, 3, 0));
}

// d(sum of c_i w_i + c aux) / dlogits by central differences in fp64, selection fixed by well-separated logits.
TEST(Router, GradientsMatchFiniteDifferences) {
  for (int32_t kind : {MACHMOE_TOPK_SOFTMAX, MACHMOE_SOFTMAX_TOPK, MACHMOE_SOFTMAX_TOPK_NORM}) {
    const RouterCase c{6, 5, 2, kind, DType::F64};
    Random random(5);
    Tensor logits = random.tensor(DType::F64, c.T * c.E, 2);
    const Tensor dweights = random.tensor(DType::F64, c.T * c.K), daux(DType::F64, std::vector<double>{0.7});
    Routed saved;
    const machmoe_route r = descriptor(c, logits, saved);
    ASSERT_EQ(MACHMOE_OK, machmoe_route_forward(&r, nullptr, 0, nullptr));
    Tensor dlogits(DType::F64, logits.size());
    const machmoe_route_grad grad{sizeof grad, dweights.data(), daux.data(), dlogits.data()};
    ASSERT_EQ(MACHMOE_OK, machmoe_route_backward(&r, &grad, nullptr, nullptr, nullptr, nullptr)) << machmoe_last_error();
    const auto loss = [&] {
      const Routed out = route(c, logits);
      double sum = daux.get(0) * out.aux.get(0);
      for (size_t i = 0; i < dweights.size(); i++) sum += dweights.get(i) * out.weights.get(i);
      return sum;
    };
    for (size_t i = 0; i < logits.size(); i++) {
      const double x = logits.get(i), step = 1e-5;
      logits.set(i, x + step);
      const double above = loss();
      logits.set(i, x - step);
      const double below = loss();
      logits.set(i, x);
      EXPECT_NEAR(dlogits.get(i), (above - below) / (2 * step), 1e-8) << "router " << kind;
    }
  }
}

TEST(Router, DSLiesOnTheDeviceOfTheRouter) {
  const RouterCase c{5, 4, 2, MACHMOE_TOPK_SOFTMAX, DType::F32};
  const Tensor logits = Random(6).tensor(c.dtype, c.T * c.E);
  Tensor dlogits(c.dtype, logits.size());
  Routed saved;
  const machmoe_route r = descriptor(c, logits, saved);
  const machmoe_route_grad grad{sizeof grad, nullptr, nullptr, dlogits.data()};
  machmoe_layer layer = layer_of({.T = c.T, .d = 8, .n = 8, .E = c.E, .K = c.K, .R_cap = c.T * c.K, .dtype = c.dtype});
  layer.device = MACHMOE_CUDA;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_route_backward(&r, &grad, &layer, nullptr, nullptr, nullptr));
  EXPECT_THAT(machmoe_last_error(), testing::HasSubstr("layer.device is 1, expected that of the route, 0"));
}

TEST(Router, ABadDescriptorHasNoWorkspace) {
  const auto fails_with = [](const char* words, auto&& mutate) {
    machmoe_route r{.struct_size = sizeof r, .T = 5, .E = 4, .K = 2};
    size_t bytes = 0;
    ASSERT_EQ(MACHMOE_OK, machmoe_route_workspace_bytes(&r, &bytes)) << machmoe_last_error();
    mutate(r);
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_route_workspace_bytes(&r, &bytes));
    EXPECT_THAT(machmoe_last_error(), testing::HasSubstr(words));
  };
  fails_with("T is -5", [](machmoe_route& r) { r.T = -5; });
  fails_with("E is -1", [](machmoe_route& r) { r.E = -1; });
  fails_with("K is 77, expected 1 .. E = 4", [](machmoe_route& r) { r.K = 77; });
  fails_with("router is 99", [](machmoe_route& r) { r.router = 99; });
  fails_with("logits_dtype is 4", [](machmoe_route& r) { r.logits_dtype = MACHMOE_I32; });
}

}  // namespace
}  // namespace machmoe::test
