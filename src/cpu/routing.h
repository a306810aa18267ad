// Routing metadata of the CPU backend (src/ops.h): stable counting sorts of int32 indices.
#pragma once
#include "ops.h"

namespace machmoe::cpu {

constexpr size_t index_scratch(const Shape&) { return 0; }
void index_topk(const IndexTopkArgs&, Stream);
void index_lists(const IndexListsArgs&, Stream);
void index_rows(const IndexRowsArgs&, Stream);

}  // namespace machmoe::cpu
