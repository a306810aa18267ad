// The experts ops of the CPU backend (src/ops.h). Results are bit-equal for every thread count.
#pragma once
#include "ops.h"

namespace machmoe::cpu {

void up_proj(const UpProjArgs&, Stream);
void down_proj(const DownProjArgs&, Stream);
void aggregate(const AggregateArgs&, Stream);
void down_proj_bwd(const DownProjBwdArgs&, Stream);
void up_proj_bwd(const UpProjBwdArgs&, Stream);
void weight_grad_w2(const WeightGradW2Args&, Stream);
void weight_grad_w1(const WeightGradW1Args&, Stream);
void bias_grad(const BiasGradArgs&, Stream);
void score_grad(const ScoreGradArgs&, Stream);

constexpr int64_t ds_parts(const Shape&) { return 1; }

}  // namespace machmoe::cpu
