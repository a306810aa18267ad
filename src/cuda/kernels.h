// The ops of the CUDA backend, one .cu file each; src/cuda/backend.cpp puts them into the table. Launches go to the given stream and never synchronise.
#pragma once
#include "ops.h"

namespace machmoe::cuda {

constexpr int64_t kMaxExperts = 4096;  // of the index ops and the router: an expert's counters fit in shared memory

// clear.cu
void clear(void* data, size_t bytes, Stream);
// metadata.cu
size_t index_scratch(const Shape&);
void index_topk(const IndexTopkArgs&, Stream);
void index_lists(const IndexListsArgs&, Stream);
void index_rows(const IndexRowsArgs&, Stream);
// topk.cu
size_t topk_scratch(int64_t T, int64_t E, int64_t K);
void topk(const TopkArgs&, Stream);
void topk_backward(const TopkBackwardArgs&, Stream);
// token_rounding.cu, token_rounding_grad.cu
size_t token_round_scratch(const Shape&);
void token_round(const TokenRoundArgs&, Stream);
void token_round_backward(const TokenRoundBackwardArgs&, Stream);
// aggregate.cu, bias_grad.cu, score_grad.cu
void aggregate(const AggregateArgs&, Stream);
void bias_grad(const BiasGradArgs&, Stream);
void score_grad(const ScoreGradArgs&, Stream);

namespace hopper {
void up_proj(const UpProjArgs&, Stream);
void down_proj(const DownProjArgs&, Stream);
void down_proj_bwd(const DownProjBwdArgs&, Stream);
int64_t ds_parts(const Shape&);  // column tiles of the dH kernel
void up_proj_bwd(const UpProjBwdArgs&, Stream);
void weight_grad_w2(const WeightGradW2Args&, Stream);
void weight_grad_w1(const WeightGradW1Args&, Stream);
}  // namespace hopper

}  // namespace machmoe::cuda
