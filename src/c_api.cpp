// The C ABI: descriptors -> Args, exceptions -> status and one sentence.
#include "machmoe/machmoe.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "core/check.h"
#include "core/workspace.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "moe.h"

namespace machmoe {
namespace {

thread_local std::string t_last_error;

// Runs one call; whatever it throws becomes a status.
template <class F>
machmoe_status guarded(F&& f) noexcept {
  try {
    t_last_error.clear();
    f();
    return MACHMOE_OK;
  } catch (const Error& e) {
    t_last_error = e.what();
    return static_cast<machmoe_status>(e.status());
  } catch (const std::bad_alloc&) {
    t_last_error = "host memory is exhausted: reduce the batch";
    return MACHMOE_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    t_last_error = e.what();
    return MACHMOE_INTERNAL_ERROR;
  } catch (...) {
    t_last_error = "the callback of machmoe_set_runner threw what is no std::exception, expected nothing thrown: catch it there";
    return MACHMOE_INTERNAL_ERROR;
  }
}

// sizeof in version 0.1.0: no caller knows less. A descriptor grows at its end alone.
constexpr size_t first_size(const machmoe_layer*) { return 80; }
constexpr size_t first_size(const machmoe_weights*) { return 152; }
constexpr size_t first_size(const machmoe_routing*) { return 80; }
constexpr size_t first_size(const machmoe_route*) { return 88; }
constexpr size_t first_size(const machmoe_route_grad*) { return 32; }
constexpr size_t first_size(const machmoe_token_round_options*) { return 40; }
constexpr size_t first_size(const machmoe_forward_io*) { return 56; }
constexpr size_t first_size(const machmoe_backward_io*) { return 224; }

// The bytes of a descriptor that the caller knows.
template <class T>
size_t known_size(const T* descriptor, const char* name) {
  constexpr size_t first = first_size(static_cast<const T*>(nullptr));
  static_assert(first <= sizeof(T));
  MACHMOE_CHECK(descriptor, "{} is null, expected a descriptor", name);
  size_t size = 0;
  std::memcpy(&size, descriptor, sizeof size);
  MACHMOE_CHECK(size >= first, "{}.struct_size is {}, expected sizeof = {}: zero-initialise the descriptor and set struct_size", name, size,
                sizeof(T));
  MACHMOE_SUPPORTED(size <= sizeof(T), "{}.struct_size is {}, expected at most {}: the caller was built against a newer machmoe, install that one",
                    name, size, sizeof(T));
  return size;
}
// The shorter descriptors of older versions are completed with zeros.
template <class T>
T read(const T* descriptor, const char* name) {
  T copy{};
  std::memcpy(&copy, descriptor, known_size(descriptor, name));
  return copy;
}

Device device_of(int32_t device) {
  MACHMOE_CHECK(device == MACHMOE_CPU || device == MACHMOE_CUDA, "device is {}, expected MACHMOE_CPU (0) or MACHMOE_CUDA (1)", device);
  return static_cast<Device>(device);
}

DType dtype_of(int32_t dtype, const char* name) {
  MACHMOE_CHECK(dtype >= MACHMOE_F32 && dtype <= MACHMOE_I64, "{} is {}, expected a machmoe_dtype value", name, dtype);
  return static_cast<DType>(dtype);
}

Shape shape_of(const machmoe_layer& layer) {
  Shape s;
  s.T = layer.T;
  s.d = layer.d;
  s.n = layer.n;
  s.E = layer.E;
  s.kind = static_cast<RoutingKind>(layer.routing_kind);
  s.K = s.kind == RoutingKind::TopK ? layer.K : 0;
  s.R_cap = layer.row_capacity;
  s.dtype = dtype_of(layer.dtype, "layer.dtype");
  s.act = {static_cast<ActivationKind>(layer.activation), layer.alpha == 0.f ? 1.702f : layer.alpha, layer.limit};
  return s;
}

// A layer descriptor with its backend. Routing calls need neither d nor n.
struct Layer {
  Shape shape;
  const Backend& backend;
};
Layer routing_layer(const machmoe_layer* layer) {
  const machmoe_layer l = read(layer, "layer");
  const Shape s = shape_of(l);
  validate_routing(s);
  return {s, backend_for(device_of(l.device))};
}
Layer experts_layer(const machmoe_layer* layer) {
  const machmoe_layer l = read(layer, "layer");
  const Shape s = shape_of(l);
  validate(s);
  const Backend& backend = backend_for(device_of(l.device));
  backend.check_shape(s);
  return {s, backend};
}

Routing routing_of(const machmoe_routing* routing) {
  const machmoe_routing r = read(routing, "routing");
  return {r.slot, r.token, r.expert, r.score, r.counts, r.offsets, r.token_offsets, r.inverse, r.tiles};
}

// The expert_stride of one expert may be anything, that of a tensor map may not: row_stride takes its place.
int64_t expert_stride(const machmoe_matrix& m, const Shape& s) { return s.E == 1 ? m.row_stride : m.expert_stride; }
ConstWeight view(const machmoe_matrix& m, const Shape& s) { return {m.base, m.row_stride, expert_stride(m, s)}; }
ConstBias view(const machmoe_vector& v) { return {v.base, v.stride, v.expert_stride}; }
MutableWeight mutable_view(const machmoe_matrix& m, const Shape& s) { return {m.base, m.row_stride, expert_stride(m, s)}; }
MutableBias mutable_view(const machmoe_vector& v) { return {v.base, v.stride, v.expert_stride}; }

Weights weights_of(const machmoe_weights* weights, const Shape& s) {
  const machmoe_weights w = read(weights, "weights");
  return {view(w.w1_gate, s), view(w.w1_up, s), view(w.w2, s), view(w.b1_gate), view(w.b1_up), view(w.b2)};
}

void check_buffer(const Backend& backend, const void* buffer, const char* name) {
  const uintptr_t alignment = &backend == &cpu_backend() ? 16 : Workspace::kAlign;
  MACHMOE_CHECK(reinterpret_cast<uintptr_t>(buffer) % alignment == 0, "{} is at {}, expected an address that is a multiple of {} bytes", name,
                fmt::ptr(buffer), alignment);
}
void check_workspace(const Backend& backend, const void* workspace, size_t bytes, size_t needed) {
  if (bytes < needed)
    throw Error(Status::WorkspaceTooSmall,
                fmt::format("workspace has {} bytes, expected {}: ask the *_workspace_bytes function of this call", bytes, needed));
  MACHMOE_CHECK(workspace || needed == 0, "workspace is null, expected {} bytes", needed);
  check_buffer(backend, workspace, "workspace");
}
void check_phases(uint32_t phases) {
  MACHMOE_CHECK(phases >= 1 && phases <= kPhaseAll, "phases is {}, expected a sum of MACHMOE_PHASE_ACTIVATION (1), WEIGHT (2) and INPUT (4)", phases);
}
template <class T>
T& out(T* pointer, const char* name) {
  MACHMOE_CHECK(pointer, "{} is null, expected the address of the result", name);
  return *pointer;
}

struct Router {
  machmoe_route route;
  RouterKind kind;
  DType dtype;
  const Backend& backend;
};
Router router_of(const machmoe_route* route) {
  const machmoe_route r = read(route, "route");
  const auto kind = static_cast<RouterKind>(r.router);
  const DType dtype = dtype_of(r.logits_dtype, "route.logits_dtype");
  validate_router(r.T, r.E, r.K, kind, dtype);
  return {r, kind, dtype, backend_for(device_of(r.device))};
}
TopkArgs topk_args(const Router& r, void* scratch) {
  const machmoe_route& p = r.route;
  return {p.T, p.E, p.K, r.kind, p.logits, r.dtype, p.ids, p.weights, p.counts, p.aux, scratch};
}

}  // namespace
}  // namespace machmoe

using namespace machmoe;

void machmoe_version(int* major, int* minor, int* patch) {
  if (major) *major = MACHMOE_VERSION_MAJOR;
  if (minor) *minor = MACHMOE_VERSION_MINOR;
  if (patch) *patch = MACHMOE_VERSION_PATCH;
}

const char* machmoe_last_error(void) { return t_last_error.c_str(); }

const char* machmoe_status_name(machmoe_status status) {
  switch (status) {
    case MACHMOE_OK: return "OK";
    case MACHMOE_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case MACHMOE_UNSUPPORTED: return "UNSUPPORTED";
    case MACHMOE_WORKSPACE_TOO_SMALL: return "WORKSPACE_TOO_SMALL";
    case MACHMOE_OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case MACHMOE_BACKEND_ERROR: return "BACKEND_ERROR";
    case MACHMOE_INTERNAL_ERROR: return "INTERNAL_ERROR";
  }
  return "unknown status";
}

int machmoe_device_available(machmoe_device device) { return device == MACHMOE_CPU || (device == MACHMOE_CUDA && cuda_backend()); }

const char* machmoe_device_reason(machmoe_device device) {
  if (device == MACHMOE_CPU) return "";
  return device == MACHMOE_CUDA ? cuda_unavailable_reason() : "unknown device: expected MACHMOE_CPU (0) or MACHMOE_CUDA (1)";
}

const char* machmoe_build_info(void) {
#ifdef MACHMOE_HAS_CUDA
  static const char* const cuda = "CUDA for sm_90a";
#else
  static const char* const cuda = "no CUDA";
#endif
  static const std::string info = fmt::format("machmoe {}.{}.{}, compiler {}, {}, {}", MACHMOE_VERSION_MAJOR, MACHMOE_VERSION_MINOR,
                                              MACHMOE_VERSION_PATCH, __VERSION__, cpu::gemm_description(), cuda);
  return info.c_str();
}

void machmoe_set_num_threads(int threads) { cpu::set_num_threads(threads); }
void machmoe_set_runner(machmoe_runner run) { cpu::set_runner(run); }
int machmoe_get_num_threads(void) { return cpu::num_threads(); }

// ---- router --------------------------------------------------------------------------------------------------------------------
machmoe_status machmoe_route_workspace_bytes(const machmoe_route* route, size_t* bytes) {
  return guarded([&] {
    const Router r = router_of(route);
    out(bytes, "bytes") = r.backend.topk_scratch(r.route.T, r.route.E, r.route.K);
  });
}

machmoe_status machmoe_route_forward(const machmoe_route* route, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Router r = router_of(route);
    const TopkArgs args = topk_args(r, workspace);
    check_workspace(r.backend, workspace, bytes, r.backend.topk_scratch(args.T, args.E, args.K));
    r.backend.topk(args, {stream});
  });
}

machmoe_status machmoe_route_backward(const machmoe_route* route, const machmoe_route_grad* grad, const machmoe_layer* layer,
                                      const machmoe_routing* routing, void* backward_workspace_buffer, void* stream) {
  return guarded([&] {
    const Router r = router_of(route);
    const machmoe_route& p = r.route;
    const machmoe_route_grad g = read(grad, "grad");
    TopkBackwardArgs args{p.T,      p.E,        p.K,     r.kind, p.logits, r.dtype, p.ids,  p.weights,
                          p.counts, g.dweights, nullptr, 0,      nullptr,  0,       g.daux, g.dlogits};
    if (!g.dweights) {
      const int32_t device = read(layer, "layer").device;
      MACHMOE_CHECK(device == p.device, "layer.device is {}, expected that of the route, {}: its kernel reads dS", device, p.device);
      const Layer l = experts_layer(layer);
      MACHMOE_CHECK(l.shape.kind == RoutingKind::TopK && l.shape.T == p.T && l.shape.K == p.K && l.shape.E == p.E,
                    "layer has (T, K, E) = ({}, {}, {}), expected the router's ({}, {}, {}) and TOPK routing", l.shape.T, l.shape.K, l.shape.E, p.T,
                    p.K, p.E);
      MACHMOE_CHECK((l.shape.dtype == DType::F64) == (r.dtype == DType::F64), "logits_dtype is {}, expected F64 with an F64 layer alone",
                    p.logits_dtype);
      MACHMOE_CHECK(backward_workspace_buffer || p.T == 0, "backward_workspace is null, expected that of the machmoe_backward that left dS");
      args.ds_parts = backward_ds_parts(l.backend, l.shape, backward_workspace_buffer);
      args.parts = l.backend.ds_parts(l.shape);
      args.inverse = routing_of(routing).inverse;
      args.R_cap = l.shape.R_cap;
    }
    r.backend.topk_backward(args, {stream});
  });
}

// ---- routing metadata ----------------------------------------------------------------------------------------------------------
machmoe_status machmoe_routing_bytes(const machmoe_layer* layer, int with_expert, size_t* metadata_bytes, size_t* workspace_bytes) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    out(metadata_bytes, "metadata_bytes") = routing_bytes(l.backend, l.shape, with_expert != 0);
    out(workspace_bytes, "workspace_bytes") = l.backend.index_scratch(l.shape);
  });
}

machmoe_status machmoe_routing_carve(const machmoe_layer* layer, int with_expert, void* metadata, machmoe_routing* routing) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    const size_t size = known_size(routing, "out");
    MACHMOE_CHECK(metadata, "metadata is null, expected a buffer of machmoe_routing_bytes()");
    check_buffer(l.backend, metadata, "metadata");
    const Routing r = carve_routing(l.backend, l.shape, with_expert != 0, metadata);
    const machmoe_routing views{size, r.slot, r.token, r.expert, r.score, r.counts, r.offsets, r.token_offsets, r.inverse, r.tiles};
    std::memcpy(routing, &views, size);
  });
}

machmoe_status machmoe_routing_from_topk(const machmoe_layer* layer, const void* ids, int32_t ids_dtype, const machmoe_routing* routing,
                                         void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    check_workspace(l.backend, workspace, bytes, l.backend.index_scratch(l.shape));
    l.backend.index_topk({l.shape, ids, dtype_of(ids_dtype, "ids_dtype"), routing_of(routing), workspace}, {stream});
  });
}

machmoe_status machmoe_routing_from_lists(const machmoe_layer* layer, const void* token_ids, const void* expert_ids, int32_t ids_dtype,
                                          const void* scores, int32_t* order, const machmoe_routing* routing, void* workspace, size_t bytes,
                                          void* stream) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    check_workspace(l.backend, workspace, bytes, l.backend.index_scratch(l.shape));
    l.backend.index_lists({l.shape, token_ids, expert_ids, dtype_of(ids_dtype, "ids_dtype"), scores, order, routing_of(routing), workspace},
                          {stream});
  });
}

machmoe_status machmoe_routing_complete(const machmoe_layer* layer, const machmoe_routing* routing, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    check_workspace(l.backend, workspace, bytes, l.backend.index_scratch(l.shape));
    l.backend.index_rows({l.shape, routing_of(routing), workspace}, {stream});
  });
}

machmoe_status machmoe_rounded_capacity(int64_t T, int64_t E, int64_t K, int64_t tile, int32_t rule, int64_t* row_capacity) {
  return guarded([&] {
    constexpr int64_t kMax = int64_t{1} << 31;
    MACHMOE_CHECK(T >= 0 && T < kMax && E >= 1 && E <= (int64_t{1} << 20) && K >= 1 && K <= E,
                  "(T, E, K) is ({}, {}, {}), expected T >= 0 and 1 <= K <= E", T, E, K);
    MACHMOE_CHECK(tile >= 1 && tile <= (int64_t{1} << 20), "tile is {}, expected 1 .. 2^20 rows", tile);
    MACHMOE_CHECK(rule >= MACHMOE_NR_F && rule <= MACHMOE_BALANCE_F, "rule is {}, expected a machmoe_rounding value", rule);
    const int64_t capacity = rounded_capacity(T, E, K, tile, static_cast<RoundingRule>(rule));
    MACHMOE_CHECK(capacity <= kMaxRows, "the capacity is {} rows, expected at most {}: split the batch", capacity, kMaxRows);
    out(row_capacity, "row_capacity") = capacity;
  });
}

machmoe_status machmoe_token_round_workspace_bytes(const machmoe_layer* layer, size_t* bytes) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    out(bytes, "bytes") = l.backend.token_round_scratch(l.shape);
  });
}

machmoe_status machmoe_token_round(const machmoe_layer* layer, const machmoe_token_round_options* options, const float* scores,
                                   const machmoe_routing* routing, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    const machmoe_token_round_options o = read(options, "options");
    check_workspace(l.backend, workspace, bytes, l.backend.token_round_scratch(l.shape));
    l.backend.token_round(
        {l.shape, o.K, o.tile, static_cast<RoundingRule>(o.rule), o.renormalize != 0, o.seed, scores, routing_of(routing), workspace}, {stream});
  });
}

machmoe_status machmoe_token_round_backward(const machmoe_layer* layer, int renormalize, const float* scores, const machmoe_routing* routing,
                                            const float* dscore, float* dscores, void* stream) {
  return guarded([&] {
    const Layer l = routing_layer(layer);
    l.backend.token_round_backward({l.shape, renormalize != 0, scores, routing_of(routing), dscore, dscores}, {stream});
  });
}

// ---- experts -------------------------------------------------------------------------------------------------------------------
machmoe_status machmoe_forward_workspace_bytes(const machmoe_layer* layer, size_t* bytes) {
  return guarded([&] {
    const Layer l = experts_layer(layer);
    out(bytes, "bytes") = forward_workspace(l.backend, l.shape);
  });
}

machmoe_status machmoe_forward(const machmoe_layer* layer, const machmoe_routing* routing, const machmoe_weights* weights,
                               const machmoe_forward_io* io, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Layer l = experts_layer(layer);
    const machmoe_forward_io f = read(io, "io");
    MACHMOE_CHECK(l.shape.kind != RoutingKind::Rows || !f.addend,
                  "io.addend is given, expected null with dispatched rows (ROWS): add it to the result");
    check_workspace(l.backend, workspace, bytes, forward_workspace(l.backend, l.shape));
    std::optional<TopkChoice> choice;
    if (f.from_topk) choice = {f.topk_ids, dtype_of(f.ids_dtype, "io.ids_dtype")};
    forward(l.backend, {l.shape, routing_of(routing), weights_of(weights, l.shape), f.x, f.addend, f.h, f.o, workspace, choice}, {stream});
  });
}

machmoe_status machmoe_backward_workspace_bytes(const machmoe_layer* layer, int with_dh, uint32_t phases, size_t* bytes) {
  return guarded([&] {
    const Layer l = experts_layer(layer);
    check_phases(phases);
    out(bytes, "bytes") = backward_workspace(l.backend, l.shape, with_dh != 0, phases);
  });
}

machmoe_status machmoe_backward(const machmoe_layer* layer, const machmoe_routing* routing, const machmoe_weights* weights,
                                const machmoe_backward_io* io, uint32_t phases, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    const Layer l = experts_layer(layer);
    const machmoe_backward_io g = read(io, "io");
    MACHMOE_CHECK(l.shape.kind != RoutingKind::Rows || !g.addend,
                  "io.addend is given, expected null with dispatched rows (ROWS): add it to the result");
    check_phases(phases);
    check_workspace(l.backend, workspace, bytes, backward_workspace(l.backend, l.shape, g.dh != nullptr, phases));
    const WeightGrads grads{mutable_view(g.dw1_gate, l.shape),
                            mutable_view(g.dw1_up, l.shape),
                            mutable_view(g.dw2, l.shape),
                            mutable_view(g.db1_gate),
                            mutable_view(g.db1_up),
                            mutable_view(g.db2),
                            dtype_of(g.grad_dtype, "io.grad_dtype"),
                            g.accumulate != 0};
    backward(l.backend,
             {l.shape, routing_of(routing), weights_of(weights, l.shape), g.x, g.h, g.d_o, g.addend, g.dx, g.dscore,
              dtype_of(g.dscore_dtype, "io.dscore_dtype"), grads, phases, workspace, g.dh},
             {stream});
  });
}
