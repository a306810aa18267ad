// Activations, value and derivative, shared by the CPU and the GPU. fp32 on the GPU; the CPU's specification also runs fp64.
#pragma once
#include <bit>
#include <cmath>
#include <type_traits>

#include "types.h"

#ifdef __CUDACC__
#define MACHMOE_HD __host__ __device__ __forceinline__
#else
#define MACHMOE_HD inline
#endif

namespace machmoe {

// A and its derivatives by gate and up at one element. Plain activations read and differentiate `up` alone.
template <class F>
struct ActivationGrad {
  F a, d_gate, d_up;
};

// exp(x). fp32 on the host: a polynomial without branches (relative error 3e-7 on [-87, 88]), so that loops over it vectorise.
MACHMOE_HD double exponential(double x) { return std::exp(x); }
MACHMOE_HD float exponential(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 2^23: the integer nearest to x / ln 2 stands in the low bits
  const float k = shifted - 12582912.f, r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  const float p = 1.f + r * (1.f + r * (0.5f + r * (0.16666667f + r * (0.041666664f + r * (0.0083334519f + r * 0.0013930436f)))));
  return p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
#endif
}

template <class F>
MACHMOE_HD F sigmoid(F x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, float>) {  // the special function unit as it is; the library's functions also treat denormals
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
    return s;
  }
#endif
  return F(1) / (F(1) + exponential(-x));
}

// x / 2 (1 + tanh z) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3).
template <class F>
MACHMOE_HD F gelu_tanh(F x, F& derivative) {
  const F c = F(1.5957691216057308), cubic = F(0.044715);  // 2 sqrt(2 / pi)
  const F s = sigmoid(c * (x + cubic * x * x * x));
  derivative = s + x * s * (F(1) - s) * c * (F(1) + F(3) * cubic * x * x);
  return x * s;
}

// x Phi(x). On the GPU Phi by Abramowitz and Stegun 26.2.17 (within 7.5e-8): it shares the density with the derivative and needs few registers.
template <class F>
MACHMOE_HD F gelu_erf(F x, F& derivative) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, float>) {
    const float density = 0.39894228f * exponential(-0.5f * x * x), t = __fdividef(1.f, 1.f + 0.2316419f * fabsf(x));
    const float tail = density * t * (0.31938153f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f))));
    const float cdf = x < 0.f ? tail : 1.f - tail;
    derivative = cdf + x * density;
    return x * cdf;
  }
#endif
  const F cdf = F(0.5) * (F(1) + std::erf(x * F(0.7071067811865476)));
  derivative = cdf + x * F(0.3989422804014327) * std::exp(F(-0.5) * x * x);
  return x * cdf;
}

template <class F>
MACHMOE_HD F silu(F x, F& derivative) {
  const F s = sigmoid(x), value = x * s;
  derivative = s + value * (F(1) - s);
  return value;
}

// max(x, 0), NaN for NaN. The derivative continues it: where x > 0 fails, the value is 0 or NaN.
template <class F>
MACHMOE_HD F relu(F x) {
  return x <= 0 ? F(0) : x;
}

// The compiler drops the derivative where only .a is used; K is a compile-time constant on the GPU.
template <ActivationKind K, class F>
MACHMOE_HD ActivationGrad<F> activate(F gate, F up, F alpha, F limit) {
  F d = 0;
  if constexpr (K == ActivationKind::SwiGLU || K == ActivationKind::SwiGLUOai) {
    F gate_slope = 1, up_slope = 1;
    if (limit > 0) {
      if (gate > limit) {
        gate = limit;
        gate_slope = 0;
      }
      if (up > limit) {
        up = limit;
        up_slope = 0;
      }
      if (up < -limit) {
        up = -limit;
        up_slope = 0;
      }
    }
    if constexpr (K == ActivationKind::SwiGLU) {
      const F v = silu(gate, d);
      return {v * up, d * up * gate_slope, v * up_slope};
    } else {
      const F s = sigmoid(alpha * gate), v = gate * s;
      d = s * (F(1) + alpha * gate * (F(1) - s));
      return {v * (up + 1), d * (up + 1) * gate_slope, v * up_slope};
    }
  } else if constexpr (K == ActivationKind::GeGLU) {
    const F v = gelu_tanh(gate, d);
    return {v * up, d * up, v};
  } else if constexpr (K == ActivationKind::ReGLU) {
    const F v = relu(gate);
    return {v * up, gate > 0 ? up : v, v};
  } else if constexpr (K == ActivationKind::ReLU2) {
    const F v = relu(up);
    return {v * v, 0, 2 * v};
  } else if constexpr (K == ActivationKind::ReLU) {
    const F v = relu(up);
    return {v, 0, up > 0 ? F(1) : v};
  } else if constexpr (K == ActivationKind::GELU) {
    const F v = gelu_tanh(up, d);
    return {v, 0, d};
  } else if constexpr (K == ActivationKind::GELUErf) {
    const F v = gelu_erf(up, d);
    return {v, 0, d};
  } else {
    const F v = silu(up, d);
    return {v, 0, d};
  }
}

// Calls f with the activation as a compile-time constant: f(ActivationTag<K>()).
template <ActivationKind K>
struct ActivationTag {
  static constexpr ActivationKind kind = K;
};
template <class Fn>
auto dispatch_activation(ActivationKind kind, Fn&& f) {
  switch (kind) {
    case ActivationKind::SwiGLU: return f(ActivationTag<ActivationKind::SwiGLU>());
    case ActivationKind::SwiGLUOai: return f(ActivationTag<ActivationKind::SwiGLUOai>());
    case ActivationKind::GeGLU: return f(ActivationTag<ActivationKind::GeGLU>());
    case ActivationKind::ReGLU: return f(ActivationTag<ActivationKind::ReGLU>());
    case ActivationKind::ReLU2: return f(ActivationTag<ActivationKind::ReLU2>());
    case ActivationKind::ReLU: return f(ActivationTag<ActivationKind::ReLU>());
    case ActivationKind::GELU: return f(ActivationTag<ActivationKind::GELU>());
    case ActivationKind::GELUErf: return f(ActivationTag<ActivationKind::GELUErf>());
    case ActivationKind::SiLU: break;
  }
  return f(ActivationTag<ActivationKind::SiLU>());
}

}  // namespace machmoe
