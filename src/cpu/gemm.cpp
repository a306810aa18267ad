#include "cpu/gemm.h"

#include <atomic>
#include <type_traits>

#include "cpu/onednn.h"
#include "cpu/storage.h"

namespace machmoe::cpu {
namespace {

// sum_k a_k b_k in 16 interleaved partial sums: a fixed order that vectorises.
template <class Accum, class T>
Accum dot(const T* a, const T* b, int64_t count) {
  Accum part[16] = {};
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int l = 0; l < 16; l++) part[l] += static_cast<Accum>(a[k + l]) * static_cast<Accum>(b[k + l]);
  for (; k < count; k++) part[k % 16] += static_cast<Accum>(a[k]) * static_cast<Accum>(b[k]);
  Accum sum = 0;
  for (Accum v : part) sum += v;
  return sum;
}

template <class T>
void plain(const Gemm& g) {
  using Accum = AccumOf<T>;
  const auto *a = static_cast<const T*>(g.a), *b = static_cast<const T*>(g.b);
  for (int64_t i = 0; i < g.M; i++) {
    Accum* c = static_cast<Accum*>(g.c) + i * g.ldc;
    if (g.layout == GemmLayout::NT) {
      for (int64_t j = 0; j < g.N; j++) c[j] = (g.accumulate ? c[j] : Accum(0)) + dot<Accum>(a + i * g.lda, b + j * g.ldb, g.K);
      continue;
    }
    for (int64_t j = 0; j < g.N && !g.accumulate; j++) c[j] = 0;
    for (int64_t k = 0; k < g.K; k++) {
      const Accum factor = static_cast<Accum>(g.layout == GemmLayout::NN ? a[i * g.lda + k] : a[k * g.lda + i]);
      for (int64_t j = 0; j < g.N; j++) c[j] += factor * static_cast<Accum>(b[k * g.ldb + j]);
    }
  }
}

std::atomic<GemmEngine> g_engine{GemmEngine::OneDNN};

}  // namespace

GemmEngine gemm_engine() { return g_engine.load() == GemmEngine::OneDNN && onednn::available() ? GemmEngine::OneDNN : GemmEngine::Plain; }
void set_gemm_engine(GemmEngine engine) { g_engine = engine; }
std::string gemm_description() { return onednn::description(); }

void gemm(const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
  if (gemm_engine() == GemmEngine::OneDNN && g.dtype != DType::F64 && g.K > 0) return onednn::matmul(g);
  dispatch_float(g.dtype, [&](auto tag) { plain<typename decltype(tag)::type>(g); });
}

}  // namespace machmoe::cpu
