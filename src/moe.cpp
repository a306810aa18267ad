#include "moe.h"

#include "core/check.h"
#include "core/workspace.h"

namespace machmoe {
namespace {

struct ForwardBuffers {
  uint32_t* turns;  // [1]
  void* index;      // TopK: of the sort, before A is written
  void *a, *y;      // [R_cap, n], [R_cap, d]
};
ForwardBuffers book_forward(const Backend& b, const Shape& s, Workspace& ws) {
  const size_t row = static_cast<size_t>(s.R_cap) * size_of(s.dtype);
  ForwardBuffers buf{};
  buf.turns = ws.take<uint32_t>(1);
  Workspace under = ws;
  if (s.kind == RoutingKind::TopK) buf.index = under.take(b.index_scratch(s));
  buf.a = ws.take(row * s.n);
  if (s.kind != RoutingKind::Rows) buf.y = ws.take(row * s.d);  // Rows: Y is the output
  ws.cover(under);
  return buf;
}

struct BackwardBuffers {
  uint32_t* turns;  // [2]: of the products over rows, of the weight gradients, which may run beside them
  void* ds_parts;   // [parts][R_cap]
  void* dh;         // [R_cap, planes, n]; the rebuilt H before it
  void* a_prime;    // [R_cap, n]
  void* dx_rows;    // [R_cap, d]
};
// What a call of these phases touches, dH left out where the caller has it. When dX~ is written dS has been summed, and A' read if its gradient is in
// the same call: dX~ lies over them.
BackwardBuffers book_backward(const Backend& b, const Shape& s, bool with_dh, uint32_t phases, Workspace& ws) {
  const size_t row = static_cast<size_t>(s.R_cap) * size_of(s.dtype);
  BackwardBuffers buf{};
  buf.turns = ws.take<uint32_t>(2);
  Workspace over = ws;
  buf.ds_parts = ws.take(static_cast<size_t>(b.ds_parts(s)) * s.R_cap * size_of(s.accum()));
  if (!with_dh) {
    buf.dh = ws.take(row * s.planes() * s.n);
    over = ws;
  }
  buf.a_prime = ws.take(row * s.n);
  if (!(phases & kPhaseWeight)) over = ws;
  if ((phases & kPhaseInput) && s.kind != RoutingKind::Rows) buf.dx_rows = over.take(row * s.d);
  ws.cover(over);
  return buf;
}

}  // namespace

size_t forward_workspace(const Backend& b, const Shape& s) {
  Workspace ws;
  book_forward(b, s, ws);
  return ws.used();
}

void forward(const Backend& b, const ForwardArgs& p, Stream stream) {
  b.check_shape(p.shape);
  check_scores(p.shape, p.routing);
  Workspace ws(p.workspace);
  const ForwardBuffers buf = book_forward(b, p.shape, ws);
  const bool rows = p.shape.kind == RoutingKind::Rows;
  void* y = rows ? p.o : buf.y;

  const Weights& w = p.weights;
  if (const auto& c = p.choice) {
    b.index_topk({p.shape, c->ids, c->ids_dtype, p.routing, buf.index, buf.turns}, stream);
  } else {
    b.clear(buf.turns, sizeof *buf.turns, stream);
  }
  b.up_proj({p.shape, p.routing, p.x, w.w1_gate, w.w1_up, w.b1_gate, w.b1_up, p.h, buf.a, buf.turns}, stream);
  b.down_proj({p.shape, p.routing, buf.a, w.w2, w.b2, y, buf.turns}, stream);
  if (!rows) b.aggregate({p.shape, p.routing, y, true, w.b2, p.addend, p.o}, stream);
}

size_t backward_workspace(const Backend& b, const Shape& s, bool with_dh, uint32_t phases) {
  Workspace ws;
  book_backward(b, s, with_dh, phases, ws);
  return ws.used();
}

const void* backward_ds_parts(const Backend& b, const Shape& s, void* workspace) {
  Workspace ws(workspace);
  return book_backward(b, s, false, kPhaseActivation, ws).ds_parts;
}

void backward(const Backend& b, const BackwardArgs& p, Stream stream) {
  b.check_shape(p.shape);
  check_scores(p.shape, p.routing);
  Workspace ws(p.workspace);
  BackwardBuffers buf = book_backward(b, p.shape, p.dh != nullptr, p.phases, ws);
  if (p.dh) buf.dh = p.dh;
  const Weights& w = p.weights;
  const WeightGrads& g = p.grads;
  const bool rows = p.shape.kind == RoutingKind::Rows;

  if (p.phases & kPhaseActivation) {
    b.clear(buf.turns, 2 * sizeof *buf.turns, stream);
    if (!p.h) b.up_proj({p.shape, p.routing, p.x, w.w1_gate, w.w1_up, w.b1_gate, w.b1_up, buf.dh, nullptr, buf.turns}, stream);
    b.down_proj_bwd({p.shape, p.routing, p.d_o, w.w2, w.b2, p.h ? p.h : buf.dh, buf.dh, buf.a_prime, buf.ds_parts, buf.turns}, stream);
    if (p.dscore) b.score_grad({p.shape, p.routing, buf.ds_parts, b.ds_parts(p.shape), p.dscore, p.dscore_dtype}, stream);
  }
  if ((p.phases & kPhaseWeight) && g.dw2.base)
    b.weight_grad_w2({p.shape, p.routing, p.d_o, buf.a_prime, g.dw2, g.dtype, g.accumulate, buf.turns + 1}, stream);
  void* dx_rows = rows ? p.dx : buf.dx_rows;
  if ((p.phases & kPhaseInput) && p.dx) b.up_proj_bwd({p.shape, p.routing, buf.dh, w.w1_gate, w.w1_up, dx_rows, buf.turns}, stream);
  if (p.phases & kPhaseWeight) {
    if (g.dw1_gate.base || g.dw1_up.base)
      b.weight_grad_w1({p.shape, p.routing, p.x, buf.dh, g.dw1_gate, g.dw1_up, g.dtype, g.accumulate, buf.turns + 1}, stream);
    if (g.db1_gate.base || g.db1_up.base || g.db2.base)
      b.bias_grad({p.shape, p.routing, buf.dh, p.d_o, g.db1_gate, g.db1_up, g.db2, g.dtype, g.accumulate}, stream);
  }
  if ((p.phases & kPhaseInput) && p.dx && !rows) b.aggregate({p.shape, p.routing, dx_rows, false, {}, p.addend, p.dx}, stream);
}

namespace {
Routing book_routing(const Backend& b, const Shape& s, bool with_expert, Workspace& ws) {
  Routing r;
  r.counts = ws.take<int32_t>(s.E);
  r.offsets = ws.take<int32_t>(s.E + 1);
  if (const int64_t bytes = b.tiles_bytes(s)) r.tiles = static_cast<int32_t*>(ws.take(static_cast<size_t>(bytes)));
  if (s.kind == RoutingKind::Rows) return r;
  r.inverse = ws.take<int32_t>(s.R_cap);
  if (s.kind == RoutingKind::TopK) {
    r.slot = ws.take<int32_t>(s.R_cap);
  } else {
    r.token = ws.take<int32_t>(s.R_cap);
    r.score = ws.take(static_cast<size_t>(s.R_cap) * size_of(s.accum()));
    r.token_offsets = ws.take<int32_t>(s.T + 1);
  }
  if (with_expert) r.expert = ws.take<int32_t>(s.R_cap);
  return r;
}
}  // namespace

size_t routing_bytes(const Backend& b, const Shape& s, bool with_expert) {
  Workspace ws;
  book_routing(b, s, with_expert, ws);
  return ws.used();
}

Routing carve_routing(const Backend& b, const Shape& s, bool with_expert, void* buffer) {
  Workspace ws(buffer);
  return book_routing(b, s, with_expert, ws);
}

}  // namespace machmoe
