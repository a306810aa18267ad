#pragma once
#include "ops.h"

namespace machmoe::cpu {

size_t token_round_scratch(const Shape&);
void token_round(const TokenRoundArgs&, Stream);

}  // namespace machmoe::cpu
