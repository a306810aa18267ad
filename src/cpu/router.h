// The top-K router of the CPU backend (src/ops.h).
#pragma once
#include "ops.h"

namespace machmoe::cpu {

constexpr size_t topk_scratch(int64_t, int64_t, int64_t) { return 0; }
void topk(const TopkArgs&, Stream);
void topk_backward(const TopkBackwardArgs&, Stream);

}  // namespace machmoe::cpu
