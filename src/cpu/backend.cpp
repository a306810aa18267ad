// The table of the CPU backend.
#include "backend.h"

#include <cstring>

#include "core/check.h"
#include "cpu/experts.h"
#include "cpu/router.h"
#include "cpu/routing.h"
#include "cpu/token_rounding.h"

namespace machmoe {
namespace {
void check_shape(const Shape& s) {
  validate(s);
#ifdef __x86_64__
  static const bool capable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  MACHMOE_SUPPORTED(capable, "this CPU has no AVX2 and FMA, expected x86-64-v3 (2013 or later)");
#endif
}
}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend table = {
      .index_scratch = [](const Shape& s) { return cpu::index_scratch(s); },
      .topk_scratch = [](int64_t T, int64_t E, int64_t K) { return cpu::topk_scratch(T, E, K); },
      .tiles_bytes = [](const Shape&) { return int64_t{0}; },
      .ds_parts = [](const Shape& s) { return cpu::ds_parts(s); },
      .check_shape = check_shape,
      .clear = [](void* data, size_t bytes, Stream) { std::memset(data, 0, bytes); },
      .index_topk = checked<cpu::index_topk>,
      .index_lists = checked<cpu::index_lists>,
      .index_rows = checked<cpu::index_rows>,
      .topk = checked<cpu::topk>,
      .topk_backward = checked<cpu::topk_backward>,
      .up_proj = checked<cpu::up_proj>,
      .down_proj = checked<cpu::down_proj>,
      .aggregate = checked<cpu::aggregate>,
      .down_proj_bwd = checked<cpu::down_proj_bwd>,
      .up_proj_bwd = checked<cpu::up_proj_bwd>,
      .weight_grad_w2 = checked<cpu::weight_grad_w2>,
      .weight_grad_w1 = checked<cpu::weight_grad_w1>,
      .bias_grad = checked<cpu::bias_grad>,
      .score_grad = checked<cpu::score_grad>,
      .token_round_scratch = [](const Shape& s) { return cpu::token_round_scratch(s); },
      .token_round = checked<cpu::token_round>,
      .token_round_backward = checked<cpu::token_round_backward>,
  };
  return table;
}

}  // namespace machmoe
