// machmoe.hpp against the shared library, as a C++ user links it: no internal header, no torch.
#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "machmoe/machmoe.hpp"

namespace {

constexpr int64_t T = 20, d = 16, n = 24, E = 4, K = 2;

std::vector<float> normal(size_t count, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> v(count);
  for (float& x : v) x = distribution(engine);
  return v;
}

struct Data {
  std::vector<float> x = normal(T * d, 1, 1), w1 = normal(E * 2 * n * d, 0.25f, 2), w2 = normal(E * d * n, 0.2f, 3), d_o = normal(T * d, 1, 4), o = x;
  std::vector<int32_t> ids;
  std::vector<float> weights = std::vector<float>(T * K, 0.5f);
  Data() {
    for (int64_t t = 0; t < T; t++) ids.insert(ids.end(), {static_cast<int32_t>(t % E), static_cast<int32_t>((t + 1) % E)});
  }
};
machmoe::Layer f32_layer() { return machmoe::Layer({.dtype = MACHMOE_F32, .T = T, .d = d, .n = n, .E = E, .K = K}); }

uint16_t bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
std::vector<uint16_t> bf16(const std::vector<float>& values) {
  std::vector<uint16_t> v;
  for (float x : values) v.push_back(bf16(x));
  return v;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

// The directional derivative of <O, dO> along dX is |dX|^2.
TEST(Facade, BackwardIsTheGradientOfForward) {
  const machmoe::Layer layer = f32_layer();
  Data v;
  const machmoe::Routing routing = layer.route_topk(v.ids.data(), v.weights.data());
  const auto weights = machmoe::concatenated(layer, v.w1.data(), v.w2.data());
  const machmoe::Saved saved = layer.forward(routing, weights, v.x.data(), v.o.data());
  std::vector<float> dx(T * d), dw1(v.w1.size()), dw2(v.w2.size());
  layer.backward(routing, weights, saved, v.x.data(), v.d_o.data(),
                 {.dx = dx.data(), .weights = machmoe::concatenated(layer, dw1.data(), dw2.data())});
  const auto loss_at = [&](float step) {
    std::vector<float> x = v.x, o(T * d);
    for (size_t i = 0; i < x.size(); i++) x[i] += step * dx[i];
    layer.forward(routing, weights, x.data(), o.data(), nullptr, false);
    return dot(o, v.d_o);
  };
  EXPECT_NEAR((loss_at(1e-3f) - loss_at(-1e-3f)) / 2e-3, dot(dx, dx), 1e-2 * dot(dx, dx));
  EXPECT_GT(dot(dw1, dw1), 0);
  EXPECT_GT(dot(dw2, dw2), 0);
}

static_assert(!std::is_convertible_v<machmoe_weights, machmoe::Weights>, "views whose type nobody has told are no gradients");
// A gradient in BF16 is the rounded one in F32, element by element: both halves of W1 stand where the layout has them.
TEST(Facade, WeightGradientsHaveTheTypeOfTheLayerOrF32) {
  const machmoe::Layer layer({.T = T, .d = d, .n = n, .E = E, .K = K});
  Data v;
  std::vector<uint16_t> x = bf16(v.x), w1 = bf16(v.w1), w2 = bf16(v.w2), b1(E * 2 * n), b2(E * d), d_o = bf16(v.d_o), o(T * d);
  const machmoe::Routing routing = layer.route_topk(v.ids.data(), v.weights.data());
  for (const auto layout : {machmoe::concatenated, machmoe::interleaved}) {
    const auto weights = layout(layer, w1.data(), w2.data(), b1.data(), b2.data(), std::nullopt);
    const machmoe::Saved saved = layer.forward(routing, weights, x.data(), o.data());
    const auto gradients = [&](auto none, std::optional<machmoe_dtype> dtype) {
      std::vector dw1(w1.size(), none), dw2(w2.size(), none), db1(b1.size(), none), db2(b2.size(), none);
      layer.backward(routing, weights, saved, x.data(), d_o.data(),
                     {.weights = layout(layer, dw1.data(), dw2.data(), db1.data(), db2.data(), dtype)});
      return std::vector{dw1, dw2, db1, db2};
    };
    const auto of_the_layer = gradients(uint16_t{0xFFFF}, std::nullopt);
    const auto f32 = gradients(-777.f, MACHMOE_F32);
    for (size_t i = 0; i < f32.size(); i++) EXPECT_EQ(bf16(f32[i]), of_the_layer[i]);
  }
}

TEST(Facade, TheLastBackwardNeedsNoMemoryForDH) {
  size_t allocated = 0;
  machmoe::LayerOptions options{.dtype = MACHMOE_F32, .T = T, .d = d, .n = n, .E = E, .K = K};
  options.allocator.allocate = [&allocated](size_t bytes) {
    allocated += bytes;
    return machmoe::Allocator().allocate(bytes);
  };
  const machmoe::Layer layer(options);
  Data v;
  const machmoe::Routing routing = layer.route_topk(v.ids.data(), v.weights.data());
  const auto weights = machmoe::concatenated(layer, v.w1.data(), v.w2.data());
  machmoe::Saved saved = layer.forward(routing, weights, v.x.data(), v.o.data());
  std::vector<float> dx(T * d), last_dx(T * d);
  allocated = 0;
  layer.backward(routing, weights, saved, v.x.data(), v.d_o.data(), {.dx = dx.data()});
  const size_t first = allocated;
  allocated = 0;
  layer.backward(routing, weights, std::move(saved), v.x.data(), v.d_o.data(), {.dx = last_dx.data()});
  EXPECT_EQ(dx, last_dx);
  EXPECT_LE(allocated + T * K * 2 * n * sizeof(float), first);
}

TEST(Facade, ListsGiveTheBitsOfTopK) {
  const machmoe::Layer topk = f32_layer(),
                       lists({.dtype = MACHMOE_F32, .routing_kind = MACHMOE_LISTS, .T = T, .d = d, .n = n, .E = E, .row_capacity = T * K});
  Data v;
  std::vector<int32_t> tokens(T * K);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<int32_t>(i / K);
  const auto weights = machmoe::concatenated(topk, v.w1.data(), v.w2.data());
  std::vector<float> a(T * d), b(T * d);
  topk.forward(topk.route_topk(v.ids.data(), v.weights.data()), weights, v.x.data(), a.data());
  lists.forward(lists.route_lists(tokens.data(), v.ids.data(), v.weights.data()), weights, v.x.data(), b.data());
  for (size_t i = 0; i < a.size(); i++) EXPECT_NEAR(a[i], b[i], 1e-6f * (1 + std::abs(a[i])));  // two rows per token may be added in either order
}

TEST(Facade, FailuresAreExceptionsWithTheSentence) {
  try {
    machmoe::Layer({.T = T, .d = 12, .n = n, .E = E, .K = K});
    FAIL() << "d = 12 must be refused";
  } catch (const machmoe::Error& e) {
    EXPECT_EQ(e.status(), MACHMOE_INVALID_ARGUMENT);
    EXPECT_THAT(e.what(), testing::HasSubstr("d is 12"));
  }
  const machmoe::Layer f64({.dtype = MACHMOE_F64, .T = T, .d = d, .n = n, .E = E, .K = K});
  Data v;
  EXPECT_THROW(f64.route_topk(v.ids.data(), v.weights.data()), machmoe::Error) << "its scores are double";
}

}  // namespace
