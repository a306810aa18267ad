// The C++ facade from an installed package: one expert, one token, a number that can be computed by hand.
#include <cmath>
#include <cstdio>
#include <machmoe/machmoe.hpp>
#include <vector>

int main() {
  constexpr int n = 8, d = 8;
  const machmoe::Layer layer({.dtype = MACHMOE_F32, .T = 1, .d = d, .n = n, .E = 1, .K = 1});
  std::vector<float> x(d, 1.f), w1(2 * n * d, 0.25f), w2(d * n, 0.5f), o(d);  // gate = up = 2
  const int32_t id = 0;
  const float weight = 0.5f;
  const machmoe::Routing routing = layer.route_topk(&id, &weight);
  layer.forward(routing, machmoe::concatenated(layer, w1.data(), w2.data()), x.data(), o.data());
  const double a = 2 * 2 / (1 + std::exp(-2.0)), expected = 0.5 * n * 0.5 * a;  // s sum_j w2 silu(gate) up
  std::printf("O = %f, expected %f\n", o[0], expected);
  return std::fabs(o[0] - expected) < 1e-5 * expected ? 0 : 1;
}
