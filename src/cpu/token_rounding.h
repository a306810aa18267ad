#pragma once
#include "ops.h"

namespace machmoe::cpu {

size_t token_round_scratch(const Shape&);
void token_round(const TokenRoundArgs&, Stream);
void token_round_backward(const TokenRoundBackwardArgs&, Stream);

}  // namespace machmoe::cpu
