// The dense product under the experts ops, on oneDNN and on plain loops, against fp64.
#include "cpu/gemm.h"

#include <gtest/gtest.h>

#include "reference.h"

namespace machmoe::test {
namespace {

using cpu::Gemm;
using cpu::GemmEngine;
using cpu::GemmLayout;

struct Extent {
  int64_t M, N, K;
};

// Operands with more columns than are read; C starts as NaN, or as ones where it is added to. Its columns past N must stay NaN.
void expect_product(GemmLayout layout, DType dtype, GemmEngine engine, bool accumulate, Extent x) {
  SCOPED_TRACE(fmt::format("layout {} dtype {} engine {} accumulate {} {}x{}x{}", int(layout), int(dtype), int(engine), accumulate, x.M, x.N, x.K));
  const DType accum = dtype == DType::F64 ? DType::F64 : DType::F32;
  const bool a_turned = layout == GemmLayout::TN, b_turned = layout == GemmLayout::NT;
  const int64_t lda = (a_turned ? x.M : x.K) + 3, ldb = (b_turned ? x.K : x.N) + 5, ldc = x.N + 2;
  Random random(11);
  const Tensor a = random.tensor(dtype, (a_turned ? x.K : x.M) * lda), b = random.tensor(dtype, (b_turned ? x.N : x.K) * ldb);
  Tensor c(accum, size_t(x.M * ldc));
  std::vector<double> expected(size_t(x.M * x.N), accumulate ? 1 : 0), actual;
  for (int64_t i = 0; i < x.M; i++)
    for (int64_t j = 0; j < x.N; j++) {
      if (accumulate) c.set(size_t(i * ldc + j), 1);
      for (int64_t k = 0; k < x.K; k++)
        expected[size_t(i * x.N + j)] += a.get(size_t(a_turned ? k * lda + i : i * lda + k)) * b.get(size_t(b_turned ? j * ldb + k : k * ldb + j));
    }
  cpu::set_gemm_engine(engine);
  cpu::gemm({layout, dtype, accumulate, x.M, x.N, x.K, a.data(), lda, b.data(), ldb, c.data(), ldc});
  cpu::set_gemm_engine(GemmEngine::OneDNN);
  for (int64_t i = 0; i < x.M; i++)
    for (int64_t j = 0; j < ldc; j++) {
      if (j < x.N) actual.push_back(c.get(size_t(i * ldc + j)));
      else ASSERT_TRUE(std::isnan(c.get(size_t(i * ldc + j)))) << "written past the product";
    }
  EXPECT_LE(relative_error(actual, expected), accum == DType::F64 ? 1e-14 : 1e-6);
}

TEST(Gemm, MatchesTheDefinition) {
  for (DType dtype : {DType::F32, DType::BF16, DType::F64})
    for (GemmEngine engine : {GemmEngine::OneDNN, GemmEngine::Plain})
      for (GemmLayout layout : {GemmLayout::NT, GemmLayout::NN, GemmLayout::TN})
        for (bool accumulate : {false, true})
          for (Extent x : {Extent{1, 1, 1}, {7, 5, 3}, {32, 8, 40}, {33, 65, 129}, {128, 72, 104}, {4, 3, 0}})
            expect_product(layout, dtype, engine, accumulate, x);
}

TEST(Gemm, EmptyProductsWriteNothing) {
  for (Extent x : {Extent{0, 4, 4}, {4, 0, 4}, {0, 0, 0}}) expect_product(GemmLayout::NN, DType::F32, GemmEngine::OneDNN, false, x);
}

TEST(Gemm, EngineIsNamed) { EXPECT_FALSE(cpu::gemm_description().empty()); }

}  // namespace
}  // namespace machmoe::test
