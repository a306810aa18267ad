// Dense matrix products of one thread, for the tiles of the experts ops: oneDNN where it is there, plain loops as the specification.
#pragma once
#include <cstdint>
#include <string>

#include "core/types.h"

namespace machmoe::cpu {

// Row-major operands; op(A) is [M, K], op(B) is [K, N].
enum class GemmLayout {
  NT,  // A [M, K], B [N, K]
  NN,  // A [M, K], B [K, N]
  TN,  // A [K, M], B [K, N]
};

// C (+)= op(A) op(B). A and B in `dtype`, C in its accumulation type (fp32; fp64 with fp64 data).
struct Gemm {
  GemmLayout layout;
  DType dtype;
  bool accumulate;  // C += ...
  int64_t M, N, K;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  void* c;
  int64_t ldc;
};
void gemm(const Gemm&);

// M and the K of a TN product are rounded up to this by the caller (zero rows), so that few shapes occur: each new one costs oneDNN about a millisecond.
constexpr int64_t kGemmGranule = 32;

enum class GemmEngine { OneDNN, Plain };
GemmEngine gemm_engine();                 // OneDNN where it was found
void set_gemm_engine(GemmEngine engine);  // OneDNN falls back to Plain where it is absent
std::string gemm_description();           // "oneDNN 2.6.3" or why not

}  // namespace machmoe::cpu
