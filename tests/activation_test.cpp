// Activations at what is no number and has no bound. Their values and derivatives elsewhere: experts_ops_test.cpp.
#include "core/activation.h"

#include <gtest/gtest.h>

#include <limits>

namespace machmoe::test {
namespace {

template <class F>
class Activations : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Activations, Types);

template <class F>
ActivationGrad<F> at(ActivationKind kind, F gate, F up) {
  return dispatch_activation(kind, [&](auto act) { return activate<decltype(act)::kind, F>(gate, up, F(1.702), F(0)); });
}

TYPED_TEST(Activations, ShowANan) {
  using F = TypeParam;
  constexpr F nan = std::numeric_limits<F>::quiet_NaN();
  for (int32_t value = 0; value <= static_cast<int32_t>(ActivationKind::SiLU); value++) {
    SCOPED_TRACE(value);
    const auto kind = static_cast<ActivationKind>(value);
    const ActivationGrad<F> of_up = at<F>(kind, 1, nan);
    EXPECT_TRUE(std::isnan(of_up.a));
    if (Activation{kind}.gated()) {
      const ActivationGrad<F> of_gate = at<F>(kind, nan, 1);
      EXPECT_TRUE(std::isnan(of_gate.a) && std::isnan(of_gate.d_gate) && std::isnan(of_gate.d_up));
      EXPECT_TRUE(std::isnan(of_up.d_gate));
    } else {
      EXPECT_TRUE(std::isnan(of_up.d_up));
    }
  }
}

TYPED_TEST(Activations, OfReluAreZeroUpToZero) {
  using F = TypeParam;
  for (const F x : {-std::numeric_limits<F>::infinity(), F(-1), F(0)}) {
    SCOPED_TRACE(x);
    for (const ActivationKind kind : {ActivationKind::ReLU, ActivationKind::ReLU2}) {
      EXPECT_EQ(at<F>(kind, 0, x).a, 0);
      EXPECT_EQ(at<F>(kind, 0, x).d_up, 0);
    }
    const ActivationGrad<F> reglu = at<F>(ActivationKind::ReGLU, x, 3);
    EXPECT_EQ(reglu.a, 0);
    EXPECT_EQ(reglu.d_gate, 0);
    EXPECT_EQ(reglu.d_up, 0);
  }
}

}  // namespace
}  // namespace machmoe::test
