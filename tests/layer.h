// Runs a Problem through the C ABI on the CPU, as a user of the library would: metadata, forward, backward.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <optional>

#include "machmoe/machmoe.h"
#include "reference.h"

namespace machmoe::test {

#define MACHMOE_OK_OR_FAIL(call) ASSERT_EQ(MACHMOE_OK, (call)) << machmoe_last_error()

// Memory on a 64-byte boundary, poisoned with NaN.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(bytes + 64, 0xFF), bytes_(bytes) {}
  void* data() { return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64; }
  size_t size() const { return bytes_; }

 private:
  std::vector<uint8_t> memory_;
  size_t bytes_;
};

// Weights or their gradients in one of the layouts of W1, with the views that describe them.
struct WeightSet {
  machmoe_weights views{};
  Tensor w1, w1_second, w2, b1, b1_second, b2;

  // Values dense as in Problem; empty biases: none.
  static WeightSet make(const Shape& s, Layout layout, bool bias, DType dtype) {
    WeightSet w;
    const int64_t planes = s.planes(), nd = s.n * s.d;
    const bool apart = layout == Layout::TwoTensors && planes == 2;
    const auto sized = [&](int64_t count) { return Tensor(dtype, static_cast<size_t>(count)); };
    w.w1 = sized(s.E * (apart ? 1 : planes) * nd);
    w.w2 = sized(s.E * nd);
    if (bias) w.b1 = sized(s.E * (apart ? 1 : planes) * s.n), w.b2 = sized(s.E * s.d);
    if (apart) w.w1_second = sized(s.E * nd);
    if (apart && bias) w.b1_second = sized(s.E * s.n);
    w.bind(s, layout);
    return w;
  }
  void bind(const Shape& s, Layout layout) {
    views = {
        .struct_size = sizeof(machmoe_weights), .w1_gate = {}, .w1_up = {}, .w2 = {w2.data(), s.n, s.d * s.n}, .b1_gate = {}, .b1_up = {}, .b2 = {}};
    const bool bias = b2.size() > 0;
    if (bias) views.b2 = {b2.data(), 1, s.d};
    const auto at = [](Tensor& t, int64_t i) {
      return static_cast<void*>(static_cast<std::byte*>(t.data()) + static_cast<size_t>(i) * size_of(t.dtype()));
    };
    if (!s.act.gated()) {
      views.w1_up = {w1.data(), s.d, s.n * s.d};
      if (bias) views.b1_up = {b1.data(), 1, s.n};
    } else if (layout == Layout::TwoTensors) {
      views.w1_gate = {w1.data(), s.d, s.n * s.d};
      views.w1_up = {w1_second.data(), s.d, s.n * s.d};
      if (bias) views.b1_gate = {b1.data(), 1, s.n}, views.b1_up = {b1_second.data(), 1, s.n};
    } else {
      const bool interleaved = layout == Layout::Interleaved;
      const int64_t row = interleaved ? 2 * s.d : s.d, up = interleaved ? 1 : s.n;
      views.w1_gate = {w1.data(), row, 2 * s.n * s.d};
      views.w1_up = {at(w1, up * s.d), row, 2 * s.n * s.d};
      if (bias) views.b1_gate = {b1.data(), interleaved ? 2 : 1, 2 * s.n}, views.b1_up = {at(b1, up), interleaved ? 2 : 1, 2 * s.n};
    }
  }
};

// Copies between a dense [E, rows, cols] tensor and a view. Element size from the tensor.
template <class F>
void each_element(const machmoe_matrix& m, int64_t E, int64_t rows, int64_t cols, F&& f) {
  for (int64_t e = 0; e < E; e++)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++)
        f(static_cast<size_t>((e * rows + i) * cols + j), static_cast<size_t>(e * m.expert_stride + i * m.row_stride + j));
}
inline void scatter(const Tensor& dense, const machmoe_matrix& m, int64_t E, int64_t rows, int64_t cols) {
  const size_t size = size_of(dense.dtype());
  each_element(m, E, rows, cols, [&](size_t from, size_t to) {
    std::memcpy(static_cast<std::byte*>(m.base) + to * size, static_cast<const std::byte*>(dense.data()) + from * size, size);
  });
}
inline Tensor gather(const machmoe_matrix& m, DType dtype, int64_t E, int64_t rows, int64_t cols) {
  if (!m.base) return {};
  Tensor dense(dtype, static_cast<size_t>(E * rows * cols));
  const size_t size = size_of(dtype);
  each_element(m, E, rows, cols, [&](size_t to, size_t from) {
    std::memcpy(static_cast<std::byte*>(dense.data()) + to * size, static_cast<const std::byte*>(m.base) + from * size, size);
  });
  return dense;
}
inline machmoe_matrix as_matrix(const machmoe_vector& v) { return {v.base, v.stride, v.expert_stride}; }

inline WeightSet weights_of(const Problem& p) {
  const Shape& s = p.shape;
  WeightSet w = WeightSet::make(s, p.c.layout, p.c.bias, s.dtype);
  if (s.act.gated()) scatter(p.w1_gate, w.views.w1_gate, s.E, s.n, s.d);
  scatter(p.w1_up, w.views.w1_up, s.E, s.n, s.d);
  scatter(p.w2, w.views.w2, s.E, s.d, s.n);
  if (!p.c.bias) return w;
  if (s.act.gated()) scatter(p.b1_gate, as_matrix(w.views.b1_gate), s.E, s.n, 1);
  scatter(p.b1_up, as_matrix(w.views.b1_up), s.E, s.n, 1);
  scatter(p.b2, as_matrix(w.views.b2), s.E, s.d, 1);
  return w;
}

inline machmoe_layer layer_of(const Shape& s) {
  return {.struct_size = sizeof(machmoe_layer),
          .device = MACHMOE_CPU,
          .dtype = static_cast<int32_t>(s.dtype),
          .activation = static_cast<int32_t>(s.act.kind),
          .routing_kind = static_cast<int32_t>(s.kind),
          .alpha = s.act.alpha,
          .limit = s.act.limit,
          .T = s.T,
          .d = s.d,
          .n = s.n,
          .E = s.E,
          .K = s.K,
          .row_capacity = s.R_cap};
}

struct RoutingBuffer {
  machmoe_routing views{.struct_size = sizeof views};
  std::vector<int32_t> order;  // row -> slot of top-K, position in the lists, or itself
  std::unique_ptr<Buffer> memory;
};
inline void build_routing(const Problem& p, RoutingBuffer& out) {
  const machmoe_layer layer = layer_of(p.shape);
  size_t bytes = 0, scratch_bytes = 0;
  MACHMOE_OK_OR_FAIL(machmoe_routing_bytes(&layer, 1, &bytes, &scratch_bytes));
  out.memory = std::make_unique<Buffer>(bytes);
  Buffer scratch(scratch_bytes);
  MACHMOE_OK_OR_FAIL(machmoe_routing_carve(&layer, 1, out.memory->data(), &out.views));
  out.order.assign(static_cast<size_t>(p.shape.R_cap), 0);
  switch (p.shape.kind) {
    case RoutingKind::TopK:
      out.views.score = const_cast<void*>(p.scores.data());
      MACHMOE_OK_OR_FAIL(machmoe_routing_from_topk(&layer, p.expert_ids.data(), MACHMOE_I32, &out.views, scratch.data(), scratch.size(), nullptr));
      std::copy_n(out.views.slot, out.order.size(), out.order.begin());
      break;
    case RoutingKind::Lists:
      MACHMOE_OK_OR_FAIL(machmoe_routing_from_lists(&layer, p.token_ids.data(), p.expert_ids.data(), MACHMOE_I32, p.scores.data(), out.order.data(),
                                                    &out.views, scratch.data(), scratch.size(), nullptr));
      break;
    case RoutingKind::Rows:
      std::copy(p.counts.begin(), p.counts.end(), out.views.counts);
      out.views.score = const_cast<void*>(p.scores.data());
      std::iota(out.order.begin(), out.order.end(), 0);
      MACHMOE_OK_OR_FAIL(machmoe_routing_complete(&layer, &out.views, scratch.data(), scratch.size(), nullptr));
  }
}

struct Options {
  bool recompute = false;
  bool dh_over_h = false;
  bool routing_in_forward = false;  // top-K
  bool addend = false;
  bool accumulate = false;                         // onto gradients of one
  std::optional<DType> grad_dtype = std::nullopt;  // else the layer's
  std::vector<uint32_t> phases = {MACHMOE_PHASE_ALL};
};
// Dense results.
struct Results {
  Tensor o, dx, dscore;
  Tensor dw1_gate, dw1_up, dw2, db1_gate, db1_up, db2;
  bool operator==(const Results&) const = default;
};

inline void run_layer(const Problem& p, const Options& options, Results& r) {
  const Shape& s = p.shape;
  const machmoe_layer layer = layer_of(s);
  RoutingBuffer routing;
  ASSERT_NO_FATAL_FAILURE(build_routing(p, routing));
  const WeightSet weights = weights_of(p);
  const void* addend = options.addend ? p.addend.data() : nullptr;

  size_t bytes = 0;
  MACHMOE_OK_OR_FAIL(machmoe_forward_workspace_bytes(&layer, &bytes));
  Buffer forward_workspace(bytes);
  Tensor h(s.dtype, static_cast<size_t>(options.recompute ? 0 : s.R_cap * s.planes() * s.n));
  r.o = Tensor(s.dtype, static_cast<size_t>(s.T * s.d));
  machmoe_forward_io forward{sizeof(machmoe_forward_io), p.x.data(), addend, options.recompute ? nullptr : h.data(), r.o.data()};
  if (options.routing_in_forward) {
    std::memset(routing.memory->data(), 0xFF, routing.memory->size());
    forward.from_topk = 1;
    forward.topk_ids = p.expert_ids.data(), forward.ids_dtype = MACHMOE_I32;
  }
  MACHMOE_OK_OR_FAIL(machmoe_forward(&layer, &routing.views, &weights.views, &forward, forward_workspace.data(), bytes, nullptr));

  const DType grad_dtype = options.grad_dtype.value_or(s.dtype);
  WeightSet grads = WeightSet::make(s, p.c.layout, p.c.bias, grad_dtype);
  if (options.accumulate)
    for (Tensor* t : {&grads.w1, &grads.w1_second, &grads.w2, &grads.b1, &grads.b1_second, &grads.b2})
      for (size_t i = 0; i < t->size(); i++) t->set(i, 1);
  r.dx = Tensor(s.dtype, static_cast<size_t>(s.T * s.d));
  r.dscore = Tensor(s.accum(), static_cast<size_t>(s.R_cap));
  machmoe_backward_io io{};
  io.struct_size = sizeof io;
  io.x = p.x.data();
  io.h = forward.h;
  io.d_o = p.d_o.data();
  io.addend = addend;
  io.dx = r.dx.data();
  io.dscore = r.dscore.data();
  io.dscore_dtype = static_cast<int32_t>(s.accum());
  io.grad_dtype = static_cast<int32_t>(grad_dtype);
  io.accumulate = options.accumulate;
  io.dw1_gate = grads.views.w1_gate, io.dw1_up = grads.views.w1_up, io.dw2 = grads.views.w2;
  io.db1_gate = grads.views.b1_gate, io.db1_up = grads.views.b1_up, io.db2 = grads.views.b2;
  io.dh = options.dh_over_h ? h.data() : nullptr;
  size_t largest = 0;
  for (uint32_t phases : options.phases) {
    MACHMOE_OK_OR_FAIL(machmoe_backward_workspace_bytes(&layer, io.dh != nullptr, phases, &bytes));
    largest = std::max(largest, bytes);
  }
  bytes = largest;
  Buffer backward_workspace(bytes);
  for (uint32_t phases : options.phases)
    MACHMOE_OK_OR_FAIL(machmoe_backward(&layer, &routing.views, &weights.views, &io, phases, backward_workspace.data(), bytes, nullptr));

  r.dw1_gate = gather(grads.views.w1_gate, grad_dtype, s.E, s.n, s.d);
  r.dw1_up = gather(grads.views.w1_up, grad_dtype, s.E, s.n, s.d);
  r.dw2 = gather(grads.views.w2, grad_dtype, s.E, s.d, s.n);
  r.db1_gate = gather(as_matrix(grads.views.b1_gate), grad_dtype, s.E, s.n, 1);
  r.db1_up = gather(as_matrix(grads.views.b1_up), grad_dtype, s.E, s.n, 1);
  r.db2 = gather(as_matrix(grads.views.b2), grad_dtype, s.E, s.d, 1);
  if (s.kind != RoutingKind::Lists) return;
  Tensor by_slot(s.accum(), std::vector<double>(static_cast<size_t>(s.R_cap), 0));  // row order -> the order of the lists
  for (size_t row = 0; row < routing.order.size(); row++)
    if (routing.order[row] >= 0) by_slot.set(static_cast<size_t>(routing.order[row]), r.dscore.get(row));
  r.dscore = by_slot;
}

}  // namespace machmoe::test
