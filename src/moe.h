// The host schedule of the 8 kernels. Everything here is shape arithmetic and calls into a Backend table.
#pragma once
#include <optional>

#include "backend.h"

namespace machmoe {

struct Weights {
  ConstWeight w1_gate, w1_up;  // [E, n, d] each; plain activations: w1_up alone
  ConstWeight w2;              // [E, d, n]
  ConstBias b1_gate, b1_up;    // [E, n]
  ConstBias b2;                // [E, d]
};

struct TopkChoice {
  const void* ids;
  DType ids_dtype;  // [T, K] I32 or I64
};

struct ForwardArgs {
  Shape shape;
  Routing routing;
  Weights weights;
  const void* x;                     // [T, d]
  const void* addend;                // [T, d] or null (residual, shared expert)
  void* h;                           // [R_cap, planes, n] saved for the backward; null: inference or recompute
  void* o;                           // [T, d]
  void* workspace;                   // forward_workspace() bytes
  std::optional<TopkChoice> choice;  // TopK: the routing is made from it first; else it is complete
};
size_t forward_workspace(const Backend&, const Shape&);
void forward(const Backend&, const ForwardArgs&, Stream);

// The backward in phases, which may be called apart on the same workspace (Activation first): the router's gradient goes
// between Activation and Input, and the weight gradient may be delayed.
enum Phase : uint32_t { kPhaseActivation = 1, kPhaseWeight = 2, kPhaseInput = 4, kPhaseAll = 7 };

struct WeightGrads {
  MutableWeight dw1_gate, dw1_up, dw2;  // base null: not wanted
  MutableBias db1_gate, db1_up, db2;
  DType dtype = DType::BF16;  // Shape::dtype or F32
  bool accumulate = false;
};

struct BackwardArgs {
  Shape shape;
  Routing routing;
  Weights weights;
  const void* x;       // [T, d]
  const void* h;       // [R_cap, planes, n]; null: rebuilt from x (recompute)
  const void* d_o;     // [T, d]
  const void* addend;  // [T, d] added to dX, or null (the router's dX)
  void* dx;            // [T, d], null: not wanted
  void* dscore;        // TopK [T, K], else [R_cap]; null: not wanted; written in phase Activation
  DType dscore_dtype;
  WeightGrads grads;
  uint32_t phases;
  void* workspace;  // backward_workspace() bytes for each call on it
  void* dh;         // [R_cap, planes, n] takes dH in every phase, and may be h itself; null: it lies in the workspace
};
// phases: of one call. A workspace for several has the largest of their sizes: least where Weight and Input are one call.
size_t backward_workspace(const Backend&, const Shape&, bool with_dh, uint32_t phases);
void backward(const Backend&, const BackwardArgs&, Stream);
// dS partials inside the workspace of a backward, for the router's backward.
const void* backward_ds_parts(const Backend&, const Shape&, void* workspace);

// One buffer holds the whole metadata of a routing (what the backward saves beside X and H).
size_t routing_bytes(const Backend&, const Shape&, bool with_expert);
Routing carve_routing(const Backend&, const Shape&, bool with_expert, void* buffer);

}  // namespace machmoe
