// A backend is a table of function pointers, one per op. The host schedule (moe.cpp) is written once against it.
#pragma once
#include "ops.h"

namespace machmoe {

struct Backend {
  // Pure host functions of the shape.
  size_t (*index_scratch)(const Shape&);                    // bytes for the three index ops
  size_t (*topk_scratch)(int64_t T, int64_t E, int64_t K);  // bytes for topk
  int64_t (*tiles_bytes)(const Shape&);                     // bytes of Routing::tiles
  int64_t (*ds_parts)(const Shape&);                        // column tiles that each leave one dS partial
  void (*check_shape)(const Shape&);                        // throws Unsupported with the fix

  void (*clear)(void* data, size_t bytes, Stream);  // zeroes a few 32-bit words of the device

  void (*index_topk)(const IndexTopkArgs&, Stream);
  void (*index_lists)(const IndexListsArgs&, Stream);
  void (*index_rows)(const IndexRowsArgs&, Stream);
  void (*topk)(const TopkArgs&, Stream);
  void (*topk_backward)(const TopkBackwardArgs&, Stream);

  void (*up_proj)(const UpProjArgs&, Stream);               // A
  void (*down_proj)(const DownProjArgs&, Stream);           // Y
  void (*aggregate)(const AggregateArgs&, Stream);          // O, dX
  void (*down_proj_bwd)(const DownProjBwdArgs&, Stream);    // dH
  void (*up_proj_bwd)(const UpProjBwdArgs&, Stream);        // dX~
  void (*weight_grad_w2)(const WeightGradW2Args&, Stream);  // dW2
  void (*weight_grad_w1)(const WeightGradW1Args&, Stream);  // dW1
  void (*bias_grad)(const BiasGradArgs&, Stream);
  void (*score_grad)(const ScoreGradArgs&, Stream);

  size_t (*token_round_scratch)(const Shape&);  // bytes for token_round
  void (*token_round)(const TokenRoundArgs&, Stream);
  void (*token_round_backward)(const TokenRoundBackwardArgs&, Stream);
};

// An op of a table: arguments are checked on the way into the backend.
template <auto op>
struct Checked;
template <class Args, void (*op)(const Args&, Stream)>
struct Checked<op> {
  static void call(const Args& args, Stream stream) {
    validate(args);
    op(args, stream);
  }
};
template <auto op>
constexpr auto checked = &Checked<op>::call;

const Backend& cpu_backend();
const Backend* cuda_backend();          // null: built without CUDA, or no usable GPU
const char* cuda_unavailable_reason();  // one sentence, "" when cuda_backend() is not null
const Backend& backend_for(Device);     // throws Unsupported with the reason

}  // namespace machmoe
