// The layer and its gradients in fp64, written from the definition: one pair (token, expert, score) at a time.
#pragma once
#include <cmath>

#include "cases.h"

namespace machmoe::test {

struct Reference {
  std::vector<double> o, dx;                  // [T, d]
  std::vector<double> dw1_gate, dw1_up, dw2;  // dense
  std::vector<double> db1_gate, db1_up, db2;
  std::vector<double> ds;  // [R_cap] by Pair::slot, 0 where dropped
};

// Value and derivatives of an activation, written apart from core/activation.h.
inline void reference_activation(const Activation& act, double g, double u, double& a, double& da_dg, double& da_du) {
  using K = ActivationKind;
  const auto sig = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto gelu = [](double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); };
  const auto gelu_erf = [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); };
  const bool clamps = act.limit > 0 && (act.kind == K::SwiGLU || act.kind == K::SwiGLUOai);
  const double limit = clamps ? double(act.limit) : 1e300;
  const double slope_g = g <= limit ? 1 : 0, slope_u = std::abs(u) <= limit ? 1 : 0;
  g = std::min(g, limit);
  u = std::clamp(u, -limit, limit);
  const auto f = [&](double gate, double up) {
    switch (act.kind) {
      case K::SwiGLU: return gate * sig(gate) * up;
      case K::SwiGLUOai: return gate * sig(double(act.alpha) * gate) * (up + 1);
      case K::GeGLU: return gelu(gate) * up;
      case K::ReGLU: return std::max(gate, 0.0) * up;
      case K::ReLU2: return std::max(up, 0.0) * std::max(up, 0.0);
      case K::ReLU: return std::max(up, 0.0);
      case K::GELU: return gelu(up);
      case K::GELUErf: return gelu_erf(up);
      case K::SiLU: break;
    }
    return up * sig(up);
  };
  const double step = 1e-5;  // central differences of order 4: an error of about 1e-11
  const auto derivative = [&](auto&& h) { return (8 * (h(step) - h(-step)) - (h(2 * step) - h(-2 * step))) / (12 * step); };
  a = f(g, u);
  da_dg = act.gated() ? slope_g * derivative([&](double x) { return f(g + x, u); }) : 0;
  da_du = slope_u * derivative([&](double x) { return f(g, u + x); });
}

inline Reference reference(const Problem& p, bool with_addend) {
  const Shape& s = p.shape;
  const bool gated = s.act.gated(), bias = p.c.bias;
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  Reference r;
  r.o.assign(count(s.T * s.d), 0);
  r.dx = r.o;
  r.dw1_up.assign(count(s.E * s.n * s.d), 0);
  if (gated) r.dw1_gate = r.dw1_up;
  r.dw2 = r.dw1_up;
  r.db1_up.assign(count(s.E * s.n), 0);
  if (gated) r.db1_gate = r.db1_up;
  r.db2.assign(count(s.E * s.d), 0);
  r.ds.assign(count(s.R_cap), 0);
  const auto x = p.x.values(), d_o = p.d_o.values(), w2 = p.w2.values(), wu = p.w1_up.values(), wg = p.w1_gate.values(), b2 = p.b2.values(),
             bu = p.b1_up.values(), bg = p.b1_gate.values();
  if (with_addend) r.o = r.dx = p.addend.values();

  std::vector<double> a(count(s.n)), slope_g(count(s.n)), slope_u(count(s.n));
  for (const Pair& pair : p.pairs) {
    const double* xt = &x[count(pair.token * s.d)];
    const double* dot = &d_o[count(pair.token * s.d)];
    const int64_t e = pair.expert;
    for (int64_t i = 0; i < s.n; i++) {
      double g = bias && gated ? bg[count(e * s.n + i)] : 0, u = bias ? bu[count(e * s.n + i)] : 0;
      for (int64_t j = 0; j < s.d; j++) {
        if (gated) g += xt[j] * wg[count((e * s.n + i) * s.d + j)];
        u += xt[j] * wu[count((e * s.n + i) * s.d + j)];
      }
      reference_activation(s.act, g, u, a[count(i)], slope_g[count(i)], slope_u[count(i)]);
    }
    std::vector<double> da(count(s.n), 0);  // dO W2
    double ds = 0;
    for (int64_t j = 0; j < s.d; j++) {
      double y = bias ? b2[count(e * s.d + j)] : 0;
      for (int64_t i = 0; i < s.n; i++) {
        const size_t w = count((e * s.d + j) * s.n + i);
        y += a[count(i)] * w2[w];
        da[count(i)] += dot[j] * w2[w];
        r.dw2[w] += pair.score * dot[j] * a[count(i)];
      }
      r.o[count(pair.token * s.d + j)] += pair.score * y;
      ds += dot[j] * y;
      r.db2[count(e * s.d + j)] += pair.score * dot[j];
    }
    r.ds[count(pair.slot)] = ds;
    for (int64_t i = 0; i < s.n; i++) {
      const double dg = pair.score * da[count(i)] * slope_g[count(i)], du = pair.score * da[count(i)] * slope_u[count(i)];
      r.db1_up[count(e * s.n + i)] += du;
      if (gated) r.db1_gate[count(e * s.n + i)] += dg;
      for (int64_t j = 0; j < s.d; j++) {
        const size_t w = count((e * s.n + i) * s.d + j);
        r.dw1_up[w] += du * xt[j];
        r.dx[count(pair.token * s.d + j)] += du * wu[w];
        if (!gated) continue;
        r.dw1_gate[w] += dg * xt[j];
        r.dx[count(pair.token * s.d + j)] += dg * wg[w];
      }
    }
  }
  return r;
}

// ||a - b|| / ||b||. Where b is zero, a must be exactly zero: anything else yields infinity.
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); i++) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  if (norm == 0) return difference == 0 ? 0 : INFINITY;
  return std::sqrt(difference / norm);
}

// The numerics contract: bf16 5e-3, fp32 1e-5. The specification in fp64 is as exact as the reference's derivatives.
inline double tolerance(DType dtype) { return dtype == DType::BF16 ? 5e-3 : dtype == DType::F32 ? 1e-5 : 1e-8; }

}  // namespace machmoe::test
