// Trains a MoE layer on a random teacher of the same shape through machmoe.hpp alone: router, experts and their gradients, plain SGD with momentum.
//
//   cmake --build build --target machmoe_teacher && build/examples/machmoe_teacher
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "machmoe/machmoe.hpp"

namespace {

constexpr int64_t T = 512, d = 32, n = 32, E = 8, K = 2;

using Floats = std::vector<float>;

class Random {
 public:
  Floats normal(int64_t count, double deviation) {
    Floats v(static_cast<size_t>(count));
    for (float& x : v) x = static_cast<float>(deviation * normal_(engine_));
    return v;
  }

 private:
  std::mt19937 engine_{1};
  std::normal_distribution<double> normal_;
};

// A parameter with its gradient and momentum.
struct Parameter {
  Floats value, grad, momentum;
  explicit Parameter(Floats v) : value(std::move(v)), grad(value.size()), momentum(value.size()) {}
  void step(float rate) {
    for (size_t i = 0; i < value.size(); i++) {
      momentum[i] = 0.9f * momentum[i] + grad[i];
      value[i] -= rate * momentum[i];
    }
  }
};

// out [T, columns] = x [T, d] w [columns, d]^T
void project(const Floats& x, const Floats& w, int64_t columns, Floats& out) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t c = 0; c < columns; c++) {
      float sum = 0;
      for (int64_t j = 0; j < d; j++) sum += x[static_cast<size_t>(t * d + j)] * w[static_cast<size_t>(c * d + j)];
      out[static_cast<size_t>(t * columns + c)] = sum;
    }
}

struct Model {
  machmoe::Layer layer{{.dtype = MACHMOE_F32, .T = T, .d = d, .n = n, .E = E, .K = K}};
  Parameter router, w1, w2;
  Floats logits = Floats(T * E), weights = Floats(T * K), o = Floats(T * d);
  std::vector<int32_t> ids = std::vector<int32_t>(T * K), counts = std::vector<int32_t>(E);
  machmoe::Routing routing;
  machmoe::Saved saved;

  explicit Model(Random& random)
      : router(random.normal(E * d, 1 / std::sqrt(double(d)))),
        w1(random.normal(E * 2 * n * d, 1 / std::sqrt(double(d)))),
        w2(random.normal(E * d * n, 1 / std::sqrt(double(n)))) {}

  machmoe_route route() {
    machmoe_route r{};
    r.struct_size = sizeof r;
    r.router = MACHMOE_TOPK_SOFTMAX;
    r.T = T, r.E = E, r.K = K;
    r.logits = logits.data(), r.ids = ids.data(), r.weights = weights.data(), r.counts = counts.data();
    return r;
  }
  void forward(const Floats& x) {
    project(x, router.value, E, logits);
    machmoe::route(route());
    routing = layer.route_topk(ids.data(), weights.data());
    saved = layer.forward(routing, machmoe::concatenated(layer, w1.value.data(), w2.value.data()), x.data(), o.data());
  }
  void backward(const Floats& x, const Floats& d_o) {
    Floats dweights(T * K), dlogits(T * E);
    layer.backward(routing, machmoe::concatenated(layer, w1.value.data(), w2.value.data()), std::move(saved), x.data(), d_o.data(),
                   {.dscore = dweights.data(), .weights = machmoe::concatenated(layer, w1.grad.data(), w2.grad.data())});
    const machmoe_route r = route();
    const machmoe_route_grad grad{sizeof grad, dweights.data(), nullptr, dlogits.data()};
    machmoe::check(machmoe_route_backward(&r, &grad, nullptr, nullptr, nullptr, nullptr));
    for (int64_t e = 0; e < E; e++)
      for (int64_t j = 0; j < d; j++) {
        float sum = 0;
        for (int64_t t = 0; t < T; t++) sum += dlogits[static_cast<size_t>(t * E + e)] * x[static_cast<size_t>(t * d + j)];
        router.grad[static_cast<size_t>(e * d + j)] = sum;
      }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random;
  Model teacher(random), student(random);
  double first = 0, loss = 0;
  for (int step = 0; step < steps; step++) {
    const Floats x = random.normal(T * d, 1);
    teacher.forward(x);
    student.forward(x);
    Floats d_o(T * d);
    loss = 0;
    for (size_t i = 0; i < d_o.size(); i++) {
      const double error = student.o[i] - teacher.o[i];
      loss += error * error / double(d_o.size());
      d_o[i] = static_cast<float>(2 * error / T);
    }
    student.backward(x, d_o);
    for (Parameter* p : {&student.router, &student.w1, &student.w2}) p->step(0.05f);
    if (step == 0) first = loss;
    if (step % 50 == 0 || step == steps - 1) std::printf("step %4d  mean squared error %.5f\n", step, loss);
  }
  std::printf("the error fell from %.4f to %.4f\n", first, loss);
  return loss < 0.5 * first ? 0 : 1;
}
