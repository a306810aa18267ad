// machmoe for C++: RAII, exceptions and views over the C ABI of machmoe.h. Header-only.
//
//   machmoe::Layer layer({.dtype = MACHMOE_F32, .T = T, .d = d, .n = n, .E = E, .K = K});
//   machmoe::Routing routing = layer.route_topk(ids, weights);        // ids [T, K] int32, weights [T, K] float
//   machmoe::Saved saved = layer.forward(routing, machmoe::concatenated(layer, w1, w2), x, o);
//   layer.backward(routing, machmoe::concatenated(layer, w1, w2), saved, x, d_o, {.dx = dx, .weights = machmoe::concatenated(layer, dw1, dw2)});
//
// Pointers are memory of the layer's device. Every failure throws machmoe::Error with the library's sentence.
#ifndef MACHMOE_HPP
#define MACHMOE_HPP

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>

#include "machmoe/machmoe.h"

namespace machmoe {

class Error : public std::runtime_error {
 public:
  Error(machmoe_status status, const char* message) : std::runtime_error(message), status_(status) {}
  machmoe_status status() const noexcept { return status_; }

 private:
  machmoe_status status_;
};

inline void check(machmoe_status status) {
  if (status != MACHMOE_OK) throw Error(status, machmoe_last_error());
}

inline size_t size_of(machmoe_dtype dtype) {
  return dtype == MACHMOE_F64 || dtype == MACHMOE_I64 ? 8 : dtype == MACHMOE_F32 || dtype == MACHMOE_I32 ? 4 : 2;
}

// Where buffers come from. The default is the host's heap; for CUDA give functions over cudaMallocAsync or your framework's allocator.
struct Allocator {
  std::function<void*(size_t bytes)> allocate = [](size_t bytes) {
    void* p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p && bytes) throw std::bad_alloc();
    return p;
  };
  std::function<void(void*)> release = [](void* p) { std::free(p); };
};

// Owned memory of an allocator.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Allocator& from, size_t bytes) : memory_(from.allocate(bytes), from.release), bytes_(bytes) {}
  void* data() const noexcept { return memory_.get(); }
  size_t size() const noexcept { return bytes_; }

 private:
  std::shared_ptr<void> memory_;
  size_t bytes_ = 0;
};

// The sizes of an experts layer; zero row_capacity means T K.
struct LayerOptions {
  machmoe_device device = MACHMOE_CPU;
  machmoe_dtype dtype = MACHMOE_BF16;
  machmoe_activation activation = MACHMOE_SWIGLU;
  machmoe_routing_kind routing_kind = MACHMOE_TOPK;
  float alpha = 0, limit = 0;
  int64_t T = 0, d = 0, n = 0, E = 0, K = 0;
  int64_t row_capacity = 0;
  void* stream = nullptr;  // cudaStream_t
  Allocator allocator = {};
};

// Routing metadata and the memory that it lies in.
class Routing {
 public:
  Routing() = default;
  Routing(machmoe_routing views, Buffer memory) : views_(views), memory_(std::move(memory)) {}
  const machmoe_routing& views() const noexcept { return views_; }  // slot or token, expert, score, counts, offsets, ...

 private:
  machmoe_routing views_{};
  Buffer memory_;
};

// What the backward needs beside its arguments: H.
struct Saved {
  Buffer h;  // [row_capacity, 2 or 1, n]; empty: recompute
};

// Views of W1, W2 and the biases, or of their gradients, and the type of the elements.
struct Weights : machmoe_weights {
  Weights() : machmoe_weights{} {}
  Weights(const machmoe_weights& views, machmoe_dtype type) : machmoe_weights(views), dtype(type) {}
  machmoe_dtype dtype = MACHMOE_F32;
};

struct Gradients {
  void* dx = nullptr;      // [T, d]
  void* dscore = nullptr;  // TOPK [T, K], else [row_capacity]
  machmoe_dtype dscore_dtype = MACHMOE_F32;
  Weights weights = {};  // dW1, dW2, db1, db2 in any layout, in the layer's type or F32; null: not wanted
  bool accumulate = false;
  const void* addend = nullptr;  // [T, d] added to dX
};

class Layer {
 public:
  explicit Layer(LayerOptions options) : options_(std::move(options)) {
    const LayerOptions& o = options_;
    descriptor_ = {sizeof(machmoe_layer),
                   o.device,
                   o.dtype,
                   o.activation,
                   o.routing_kind,
                   o.alpha,
                   o.limit,
                   o.T,
                   o.d,
                   o.n,
                   o.E,
                   o.K,
                   o.row_capacity ? o.row_capacity : o.T * o.K};
    size_t bytes = 0;
    check(machmoe_forward_workspace_bytes(&descriptor_, &bytes));  // every size is checked here
  }
  const machmoe_layer& descriptor() const noexcept { return descriptor_; }
  bool gated() const noexcept { return options_.activation <= MACHMOE_REGLU; }
  machmoe_dtype dtype() const noexcept { return options_.dtype; }
  size_t element_size() const noexcept { return size_of(options_.dtype); }

  // ids [T, K] int32. weights [T, K] fp32 stay the caller's memory, which must live, unchanged, as long as the routing is used.
  Routing route_topk(const int32_t* ids, const float* weights) const {
    return make_routing(weights, [&](machmoe_routing& out, const Buffer& scratch) {
      out.score = const_cast<float*>(weights);  // only read
      return machmoe_routing_from_topk(&descriptor_, ids, MACHMOE_I32, &out, scratch.data(), scratch.size(), options_.stream);
    });
  }
  // row_capacity triples in any order.
  Routing route_lists(const int32_t* token_ids, const int32_t* expert_ids, const float* scores) const {
    return make_routing(scores, [&](const machmoe_routing& out, const Buffer& scratch) {
      return machmoe_routing_from_lists(&descriptor_, token_ids, expert_ids, MACHMOE_I32, scores, nullptr, &out, scratch.data(), scratch.size(),
                                        options_.stream);
    });
  }
  // Dispatched rows (ROWS): counts [E] and row_scores [row_capacity] (or null) stay the caller's memory.
  Routing route_rows(int32_t* counts, float* row_scores) const {
    return make_routing(row_scores, [&](machmoe_routing& out, const Buffer& scratch) {
      out.counts = counts;
      out.score = row_scores;
      return machmoe_routing_complete(&descriptor_, &out, scratch.data(), scratch.size(), options_.stream);
    });
  }

  // o [T, d] from x [T, d]. Inference and recompute save nothing.
  Saved forward(const Routing& routing, const machmoe_weights& weights, const void* x, void* o, const void* addend = nullptr,
                bool save_h = true) const {
    Saved saved;
    const int64_t h_elements = descriptor_.row_capacity * (gated() ? 2 : 1) * descriptor_.n;
    if (save_h) saved.h = Buffer(options_.allocator, static_cast<size_t>(h_elements) * element_size());
    size_t bytes = 0;
    check(machmoe_forward_workspace_bytes(&descriptor_, &bytes));
    const Buffer workspace(options_.allocator, bytes);
    const machmoe_forward_io io{sizeof(machmoe_forward_io), x, addend, saved.h.data(), o};
    check(machmoe_forward(&descriptor_, &routing.views(), &weights, &io, workspace.data(), bytes, options_.stream));
    return saved;
  }

  void backward(const Routing& routing, const machmoe_weights& weights, const Saved& saved, const void* x, const void* d_o,
                const Gradients& g) const {
    backward(routing, weights, saved, nullptr, x, d_o, g);
  }
  // The last backward of these H: dH takes their place, so that no memory for it is needed.
  void backward(const Routing& routing, const machmoe_weights& weights, Saved&& saved, const void* x, const void* d_o, const Gradients& g) const {
    backward(routing, weights, saved, saved.h.data(), x, d_o, g);
    saved = {};
  }

 private:
  void backward(const Routing& routing, const machmoe_weights& weights, const Saved& saved, void* dh, const void* x, const void* d_o,
                const Gradients& g) const {
    size_t bytes = 0;
    check(machmoe_backward_workspace_bytes(&descriptor_, dh != nullptr, MACHMOE_PHASE_ALL, &bytes));
    const Buffer workspace(options_.allocator, bytes);
    machmoe_backward_io io{};
    io.struct_size = sizeof io;
    io.x = x;
    io.h = saved.h.data();
    io.d_o = d_o;
    io.addend = g.addend;
    io.dx = g.dx;
    io.dscore = g.dscore;
    io.dscore_dtype = g.dscore_dtype;
    io.grad_dtype = g.weights.dtype;
    io.accumulate = g.accumulate;
    io.dw1_gate = g.weights.w1_gate, io.dw1_up = g.weights.w1_up, io.dw2 = g.weights.w2;
    io.db1_gate = g.weights.b1_gate, io.db1_up = g.weights.b1_up, io.db2 = g.weights.b2;
    io.dh = dh;
    check(machmoe_backward(&descriptor_, &routing.views(), &weights, &io, MACHMOE_PHASE_ALL, workspace.data(), bytes, options_.stream));
  }

  template <class Fill>
  Routing make_routing(const float* scores, Fill&& fill) const {
    if (scores && options_.dtype == MACHMOE_F64)
      throw Error(MACHMOE_UNSUPPORTED, "dtype is F64, expected F32 or BF16: scores are float here, use the C API");
    size_t bytes = 0, scratch_bytes = 0;
    check(machmoe_routing_bytes(&descriptor_, 1, &bytes, &scratch_bytes));
    const Buffer memory(options_.allocator, bytes), scratch(options_.allocator, scratch_bytes);
    machmoe_routing views{};
    views.struct_size = sizeof views;
    check(machmoe_routing_carve(&descriptor_, 1, memory.data(), &views));
    check(fill(views, scratch));
    return {views, memory};
  }

  LayerOptions options_;
  machmoe_layer descriptor_{};
};

// Weights in the layouts of W1: b1 [E, 2n] (or [E, n] without a gate) and b2 [E, d] may be null. dtype: the layer's, or F32 for gradients.
// w1 [E, 2n, d] with all gate rows before the up rows; [E, n, d] for an activation without a gate. w2 [E, d, n].
inline Weights concatenated(const Layer& layer, void* w1, void* w2, void* b1 = nullptr, void* b2 = nullptr,
                            std::optional<machmoe_dtype> dtype = std::nullopt) {
  const machmoe_layer& l = layer.descriptor();
  Weights w({}, dtype.value_or(layer.dtype()));
  const int64_t planes = layer.gated() ? 2 : 1, size = static_cast<int64_t>(size_of(w.dtype));
  const auto at = [&](void* base, int64_t i) { return base ? static_cast<void*>(static_cast<char*>(base) + i * size) : nullptr; };
  w.struct_size = sizeof(machmoe_weights);
  if (layer.gated()) {
    w.w1_gate = {w1, l.d, planes * l.n * l.d};
    w.b1_gate = {b1, 1, planes * l.n};
  }
  const int64_t up = layer.gated() ? l.n : 0;
  w.w1_up = {at(w1, up * l.d), l.d, planes * l.n * l.d};
  w.b1_up = {at(b1, up), 1, planes * l.n};
  w.w2 = {w2, l.n, l.d * l.n};
  w.b2 = {b2, 1, l.d};
  return w;
}
// w1 [E, 2n, d] with row 2i gate and row 2i + 1 up; gated activations.
inline Weights interleaved(const Layer& layer, void* w1, void* w2, void* b1 = nullptr, void* b2 = nullptr,
                           std::optional<machmoe_dtype> dtype = std::nullopt) {
  const machmoe_layer& l = layer.descriptor();
  Weights w = concatenated(layer, w1, w2, b1, b2, dtype);
  const auto size = static_cast<int64_t>(size_of(w.dtype));
  const auto at = [&](void* base, int64_t i) { return base ? static_cast<void*>(static_cast<char*>(base) + i * size) : nullptr; };
  w.w1_gate = {w1, 2 * l.d, 2 * l.n * l.d};
  w.w1_up = {at(w1, l.d), 2 * l.d, 2 * l.n * l.d};
  w.b1_gate = {b1, 2, 2 * l.n};
  w.b1_up = {at(b1, 1), 2, 2 * l.n};
  return w;
}
// Two tensors [E, n, d].
inline Weights two_tensors(const Layer& layer, void* w1_gate, void* w1_up, void* w2, std::optional<machmoe_dtype> dtype = std::nullopt) {
  const machmoe_layer& l = layer.descriptor();
  Weights w = concatenated(layer, nullptr, w2, nullptr, nullptr, dtype);
  w.w1_gate = {w1_gate, l.d, l.n * l.d};
  w.w1_up = {w1_up, l.d, l.n * l.d};
  return w;
}

// Top-K router: ids [T, K] int32 and weights [T, K] fp32 from logits [T, E]; counts [E]; aux [1] or null.
inline void route(const machmoe_route& r, void* stream = nullptr, const Allocator& allocator = {}) {
  size_t bytes = 0;
  check(machmoe_route_workspace_bytes(&r, &bytes));
  const Buffer workspace(allocator, bytes);
  check(machmoe_route_forward(&r, workspace.data(), bytes, stream));
}

}  // namespace machmoe
#endif
