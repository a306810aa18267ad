// PyTorch operators on libtorch's stable ABI: tensors -> descriptors of the C ABI, memory from torch, errors as exceptions.
// One binary serves every torch >= 2.11 and every Python. The autograd.Functions and the fakes are in python/machmoe.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "machmoe/machmoe.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(machmoe_status status) {
  if (status != MACHMOE_OK) throw std::runtime_error(machmoe_last_error());
}

// ---- dtypes, memory, devices ---------------------------------------------------------------------------------------------------
int32_t dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return MACHMOE_F32;
    case ScalarType::BFloat16: return MACHMOE_BF16;
    case ScalarType::Half: return MACHMOE_F16;
    case ScalarType::Double: return MACHMOE_F64;
    case ScalarType::Int: return MACHMOE_I32;
    case ScalarType::Long: return MACHMOE_I64;
    default:
      throw std::runtime_error(std::string(name) +
                               " has a dtype that machmoe does not read, expected float32, bfloat16, float16, float64, int32 or int64");
  }
}
int32_t shim_dtype(int32_t dtype) {
  switch (dtype) {
    case MACHMOE_BF16: return aoti_torch_dtype_bfloat16();
    case MACHMOE_F16: return aoti_torch_dtype_float16();
    case MACHMOE_F64: return aoti_torch_dtype_float64();
    case MACHMOE_I32: return aoti_torch_dtype_int32();
    case MACHMOE_I64: return aoti_torch_dtype_int64();
    default: return aoti_torch_dtype_float32();
  }
}
int32_t accum_of(int32_t dtype) { return dtype == MACHMOE_F64 ? MACHMOE_F64 : MACHMOE_F32; }
int32_t device_of(const Tensor& t) { return t.is_cuda() ? MACHMOE_CUDA : MACHMOE_CPU; }

// A fresh contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), shim_dtype(dtype),
                                                  like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
                                                  like.is_cuda() ? like.get_device() : 0, &handle));
  return Tensor(handle);
}
// Workspaces and metadata in units of int32.
Tensor bytes(const Tensor& like, size_t count) { return empty(like, {static_cast<int64_t>((count + 3) / 4)}, MACHMOE_I32); }

// The workspace of a forward or a backward. On the CPU a thread keeps its largest one: the pages of a fresh one would be mapped at every call.
Tensor workspace_of(const Tensor& like, size_t count) {
  if (like.is_cuda()) return bytes(like, count);
  thread_local std::optional<Tensor> kept;
  if (!kept || static_cast<size_t>(kept->numel()) * 4 < count) {
    kept.reset();
    kept = bytes(like, count);
  }
  return *kept;
}

void* data(const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }
void* data(const Optional& t) { return t ? data(*t) : nullptr; }
// Kernels read tokens 16 bytes at a time: a view that begins elsewhere, a piece of a concatenation for one, is copied.
Tensor aligned(const Tensor& t) {
  const bool is_aligned = !t.is_cuda() || reinterpret_cast<uintptr_t>(data(t)) % 16 == 0;
  return is_aligned ? t : torch::stable::clone(t);
}
void* at(const Tensor& t, int64_t elements) {
  static constexpr int64_t sizes[] = {4, 2, 2, 8, 4, 8};
  return static_cast<char*>(t.data_ptr()) + elements * sizes[dtype_of(t, "tensor")];
}

// cudaStream_t of the current stream. The function exists in libtorch_cuda.so alone: found once where that library is in the process.
void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!function) throw std::runtime_error("a CUDA tensor came, expected libtorch_cuda.so in the process: install a torch built for CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}
void run_on_torch_threads(int threads, void (*work)(void*), void* context) {
  torch::stable::parallel_for(0, threads, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(context);
  });
}
// Makes the tensor's device current and knows its stream; on the CPU the library works on torch's threads and obeys their count.
class Launch {
 public:
  explicit Launch(const Tensor& t) {
    if (t.is_cuda()) {
      guard_.emplace(t.get_device());
      stream_ = current_cuda_stream(t.get_device());
    } else {
      machmoe_set_num_threads(static_cast<int>(torch::stable::get_num_threads()));
      machmoe_set_runner(run_on_torch_threads);
    }
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// ---- descriptors ---------------------------------------------------------------------------------------------------------------
// A layer as far as routing metadata goes.
machmoe_layer routing_layer(const Tensor& like, int32_t accum, int64_t kind, int64_t T, int64_t E, int64_t K, int64_t row_capacity) {
  machmoe_layer l{};
  l.struct_size = sizeof l;
  l.device = device_of(like);
  l.dtype = accum == MACHMOE_F64 ? MACHMOE_F64 : like.is_cuda() ? MACHMOE_BF16 : MACHMOE_F32;
  l.routing_kind = static_cast<int32_t>(kind);
  l.T = T, l.E = E, l.K = K;
  l.row_capacity = row_capacity;
  return l;
}

// The expert of each row lies apart: no kernel reads it, so the backward need not keep it.
struct Metadata {
  machmoe_routing routing{};
  Tensor memory;
  Tensor scratch;
  size_t scratch_bytes = 0;
};
Metadata new_metadata(const machmoe_layer& layer, const Tensor& like) {
  size_t metadata_bytes = 0, scratch_bytes = 0;
  check(machmoe_routing_bytes(&layer, 0, &metadata_bytes, &scratch_bytes));
  Metadata m{{sizeof(machmoe_routing)}, bytes(like, metadata_bytes), bytes(like, scratch_bytes), scratch_bytes};
  check(machmoe_routing_carve(&layer, 0, m.memory.data_ptr(), &m.routing));
  return m;
}

// What all experts operators are given: see the schemas below.
struct Layer {
  machmoe_layer layer{};
  machmoe_weights weights{};
  machmoe_routing routing{sizeof routing};
};

void check_last_stride(const Tensor& t, const char* name) {
  if (t.numel() && t.stride(t.dim() - 1) != 1)
    throw std::runtime_error(std::string(name) + " has stride " + std::to_string(t.stride(t.dim() - 1)) +
                             " in its last dimension, expected 1: transposed weights are not supported, store them as [E, rows, columns]");
}
machmoe_matrix matrix(const Tensor& t) { return {data(t), t.stride(1), t.stride(0)}; }
machmoe_vector vector(const Tensor& t) { return {data(t), t.stride(1), t.stride(0)}; }

// Gate and up views of W1 (or its gradient) and b1.
machmoe_weights weight_views(const Tensor& w1, const Optional& w1_up, const Tensor& w2, const Optional& b1, const Optional& b1_up, const Optional& b2,
                             bool gated, bool interleaved) {
  machmoe_weights w{};
  w.struct_size = sizeof w;
  const int64_t n = w2.size(2);
  if (!gated) {
    w.w1_up = matrix(w1);
    if (b1) w.b1_up = vector(*b1);
  } else if (w1_up) {
    w.w1_gate = matrix(w1);
    w.w1_up = matrix(*w1_up);
    if (b1) w.b1_gate = vector(*b1);
    if (b1_up) w.b1_up = vector(*b1_up);
  } else {
    const int64_t step = interleaved ? 2 : 1, up = interleaved ? 1 : n;
    w.w1_gate = {data(w1), step * w1.stride(1), w1.stride(0)};
    w.w1_up = {at(w1, up * w1.stride(1)), step * w1.stride(1), w1.stride(0)};
    if (b1) {
      w.b1_gate = {data(*b1), step * b1->stride(1), b1->stride(0)};
      w.b1_up = {at(*b1, up * b1->stride(1)), step * b1->stride(1), b1->stride(0)};
    }
  }
  w.w2 = matrix(w2);
  if (b2) w.b2 = vector(*b2);
  return w;
}

bool is_gated(int64_t activation) { return activation <= MACHMOE_REGLU; }

Layer make_layer(const Tensor& x, const Tensor& w1, const Optional& w1_up, const Tensor& w2, const Optional& b1, const Optional& b1_up,
                 const Optional& b2, int64_t kind, int64_t K, int64_t row_capacity, int64_t activation, double alpha, double limit,
                 bool interleaved) {
  for (auto [t, name] : {std::pair{&w1, "w1"}, {&w2, "w2"}}) check_last_stride(*t, name);
  if (w1_up) check_last_stride(*w1_up, "w1[1]");
  Layer l;
  l.layer = routing_layer(x, MACHMOE_F32, kind, x.size(0), w2.size(0), K, row_capacity);
  l.layer.dtype = dtype_of(x, "x");
  l.layer.activation = static_cast<int32_t>(activation);
  l.layer.alpha = static_cast<float>(alpha);
  l.layer.limit = static_cast<float>(limit);
  l.layer.d = w2.size(1);
  l.layer.n = w2.size(2);
  l.weights = weight_views(w1, w1_up, w2, b1, b1_up, b2, is_gated(activation), interleaved);
  return l;
}
int64_t row_capacity_of(const Tensor& x, const Optional& score, int64_t kind, int64_t K) {
  return kind == MACHMOE_TOPK ? x.size(0) * K : kind == MACHMOE_LISTS ? score->size(0) : x.size(0);
}
// The metadata of lists come from the caller beside their scores, from whose number and type they are carved.
void check_metadata(const machmoe_layer& layer, const Tensor& metadata) {
  size_t expected = 0, scratch = 0;
  check(machmoe_routing_bytes(&layer, 0, &expected, &scratch));
  if (static_cast<size_t>(metadata.numel()) != (expected + 3) / 4)
    throw std::runtime_error("the metadata of the routing have " + std::to_string(metadata.numel()) + " int32, expected " +
                             std::to_string((expected + 3) / 4) + " for " + std::to_string(layer.row_capacity) +
                             " scores of their type: keep a routing with the score that it was made with");
}
void use_routing(Layer& l, const Tensor& metadata, const Optional& counts, const Optional& score) {
  if (l.layer.routing_kind == MACHMOE_LISTS) check_metadata(l.layer, metadata);
  check(machmoe_routing_carve(&l.layer, 0, metadata.data_ptr(), &l.routing));
  if (counts) l.routing.counts = static_cast<int32_t*>(data(*counts));
  if (!score) return;
  const bool f64 = accum_of(l.layer.dtype) == MACHMOE_F64;
  if (score->scalar_type() != (f64 ? ScalarType::Double : ScalarType::Float))
    throw std::runtime_error(std::string("the scores (topk_weights) are not ") + (f64 ? "float64" : "float32") +
                             ", expected so beside x of this dtype: convert them");
  if (score->numel() != l.layer.row_capacity)
    throw std::runtime_error("the scores (topk_weights) have " + std::to_string(score->numel()) + " elements, expected one for each of the " +
                             std::to_string(l.layer.row_capacity) + " rows");
  l.routing.score = data(*score);
}

// ---- routing -------------------------------------------------------------------------------------------------------------------
// Metadata, expert of each row, list position of each row.
std::tuple<Tensor, Tensor, Tensor> routing_lists(const Tensor& token_ids, const Tensor& expert_ids, const Tensor& scores, int64_t num_tokens,
                                                 int64_t num_experts) {
  const Launch launch(token_ids);
  const int64_t R = token_ids.numel();
  const machmoe_layer layer = routing_layer(token_ids, dtype_of(scores, "scores"), MACHMOE_LISTS, num_tokens, num_experts, 0, R);
  Metadata m = new_metadata(layer, token_ids);
  const Tensor expert = empty(token_ids, {R}, MACHMOE_I32), order = empty(token_ids, {R}, MACHMOE_I32);
  m.routing.expert = static_cast<int32_t*>(data(expert));
  check(machmoe_routing_from_lists(&layer, data(token_ids), data(expert_ids), dtype_of(token_ids, "token_ids"), data(scores),
                                   static_cast<int32_t*>(data(order)), &m.routing, data(m.scratch), m.scratch_bytes, launch.stream()));
  return {m.memory, expert, order};
}

Tensor routing_rows(const Tensor& counts, const Tensor& rows) {
  const Launch launch(rows);
  const machmoe_layer layer = routing_layer(rows, accum_of(dtype_of(rows, "rows")), MACHMOE_ROWS, rows.size(0), counts.size(0), 0, rows.size(0));
  Metadata m = new_metadata(layer, rows);
  m.routing.counts = static_cast<int32_t*>(data(counts));
  check(machmoe_routing_complete(&layer, &m.routing, data(m.scratch), m.scratch_bytes, launch.stream()));
  return m.memory;
}

int64_t rounded_capacity(int64_t T, int64_t E, int64_t K, int64_t tile, int64_t rule) {
  int64_t capacity = 0;
  check(machmoe_rounded_capacity(T, E, K, tile, static_cast<int32_t>(rule), &capacity));
  return capacity;
}

// Metadata, expert of each row. The seed is a tensor on the CPU: drawn inside a compiled graph, it stays random there.
std::tuple<Tensor, Tensor> token_round(const Tensor& scores, int64_t K, int64_t tile, int64_t rule, bool renormalize, const Tensor& seed) {
  const Launch launch(scores);
  const int64_t T = scores.size(0), E = scores.size(1);
  const machmoe_layer layer = routing_layer(scores, MACHMOE_F32, MACHMOE_LISTS, T, E, 0, rounded_capacity(T, E, K, tile, rule));
  Metadata m = new_metadata(layer, scores);
  const Tensor expert = empty(scores, {layer.row_capacity}, MACHMOE_I32);
  m.routing.expert = static_cast<int32_t*>(data(expert));
  const auto seed_value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  const machmoe_token_round_options options{sizeof options, K, tile, static_cast<int32_t>(rule), renormalize, seed_value};
  size_t scratch_bytes = 0;
  check(machmoe_token_round_workspace_bytes(&layer, &scratch_bytes));
  const Tensor scratch = bytes(scores, scratch_bytes);
  check(machmoe_token_round(&layer, &options, static_cast<const float*>(data(scores)), &m.routing, data(scratch), scratch_bytes, launch.stream()));
  return {m.memory, expert};
}

Tensor token_round_backward(const Tensor& d_score, const Tensor& scores, const Tensor& metadata, const Tensor& expert, bool renormalize) {
  const Launch launch(scores);
  const int64_t T = scores.size(0), E = scores.size(1);
  const machmoe_layer layer = routing_layer(scores, MACHMOE_F32, MACHMOE_LISTS, T, E, 0, expert.size(0));
  machmoe_routing routing{sizeof routing};
  check(machmoe_routing_carve(&layer, 0, metadata.data_ptr(), &routing));
  routing.expert = static_cast<int32_t*>(data(expert));
  const Tensor d_scores = empty(scores, {T, E}, MACHMOE_F32);
  check(machmoe_token_round_backward(&layer, renormalize, static_cast<const float*>(data(scores)), &routing, static_cast<const float*>(data(d_score)),
                                     static_cast<float*>(data(d_scores)), launch.stream()));
  return d_scores;
}

// ---- router --------------------------------------------------------------------------------------------------------------------
machmoe_route route_descriptor(const Tensor& logits, int64_t router, int64_t K, const Tensor& ids, const Tensor& weights, const Tensor& counts) {
  machmoe_route r{};
  r.struct_size = sizeof r;
  r.device = device_of(logits);
  r.router = static_cast<int32_t>(router);
  r.logits_dtype = dtype_of(logits, "logits");
  r.T = logits.size(0), r.E = logits.size(1), r.K = K;
  r.logits = data(logits);
  r.ids = static_cast<int32_t*>(data(ids));
  r.weights = data(weights);
  r.counts = static_cast<int32_t*>(data(counts));
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_forward(const Tensor& logits, int64_t K, int64_t router) {
  const Launch launch(logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  const int32_t accum = accum_of(dtype_of(logits, "logits"));
  const Tensor ids = empty(logits, {T, K}, MACHMOE_I32), weights = empty(logits, {T, K}, accum), counts = empty(logits, {E}, MACHMOE_I32),
               aux = empty(logits, {}, accum);
  machmoe_route r = route_descriptor(logits, router, K, ids, weights, counts);
  r.aux = aux.data_ptr();
  size_t scratch_bytes = 0;
  check(machmoe_route_workspace_bytes(&r, &scratch_bytes));
  const Tensor scratch = bytes(logits, scratch_bytes);
  check(machmoe_route_forward(&r, data(scratch), scratch_bytes, launch.stream()));
  return {ids, weights, counts, aux};
}

Tensor route_backward(const Tensor& dweights, const Optional& daux, const Tensor& logits, const Tensor& ids, const Tensor& weights,
                      const Tensor& counts, int64_t router) {
  const Launch launch(logits);
  const Tensor dlogits = empty(logits, {logits.size(0), logits.size(1)}, dtype_of(logits, "logits"));
  const machmoe_route r = route_descriptor(logits, router, ids.size(1), ids, weights, counts);
  const machmoe_route_grad g{sizeof g, data(dweights), data(daux), data(dlogits)};
  if (logits.numel()) check(machmoe_route_backward(&r, &g, nullptr, nullptr, nullptr, launch.stream()));
  return dlogits;
}

// ---- experts -------------------------------------------------------------------------------------------------------------------
// O, and H unless it is not wanted. ids: of top-K, whose metadata is made in the same call.
std::tuple<Tensor, Tensor> forward(const Layer& l, const Tensor& x, const Optional& addend, bool save_h, const Tensor* ids, void* stream) {
  const int64_t planes = is_gated(l.layer.activation) ? 2 : 1;
  const Tensor o = empty(x, {x.size(0), x.size(1)}, l.layer.dtype);
  const Tensor h = save_h ? empty(x, {l.layer.row_capacity, planes, l.layer.n}, l.layer.dtype) : Tensor();
  const Tensor rows = aligned(x);
  const Optional added = addend ? Optional(aligned(*addend)) : std::nullopt;
  machmoe_forward_io io{};
  io.struct_size = sizeof io;
  io.x = data(rows);
  io.addend = data(added);
  io.h = data(h);
  io.o = data(o);
  if (ids) {
    io.from_topk = 1;
    io.topk_ids = data(*ids), io.ids_dtype = dtype_of(*ids, "topk_ids");
  }
  size_t workspace_bytes = 0;
  check(machmoe_forward_workspace_bytes(&l.layer, &workspace_bytes));
  const Tensor workspace = workspace_of(x, workspace_bytes);
  check(machmoe_forward(&l.layer, &l.routing, &l.weights, &io, data(workspace), workspace_bytes, stream));
  return {o, h};
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& x, const Tensor& w1, const Optional& w1_up, const Tensor& w2, const Optional& b1,
                                           const Optional& b1_up, const Optional& b2, const Optional& addend, const Tensor& metadata,
                                           const Optional& counts, const Optional& score, int64_t kind, int64_t activation, double alpha,
                                           double limit, bool interleaved, bool save_h) {
  const Launch launch(x);
  if (kind == MACHMOE_TOPK)
    throw std::runtime_error("kind is 0 (top-K), expected 1 (lists) or 2 (rows): topk_experts_forward makes the metadata too");
  Layer l = make_layer(x, w1, w1_up, w2, b1, b1_up, b2, kind, 0, row_capacity_of(x, score, kind, 0), activation, alpha, limit, interleaved);
  use_routing(l, metadata, counts, score);
  return forward(l, x, addend, save_h, nullptr, launch.stream());
}

// Metadata of top-K ids and the experts in one call: O, H, metadata.
std::tuple<Tensor, Tensor, Tensor> topk_experts_forward(const Tensor& x, const Tensor& w1, const Optional& w1_up, const Tensor& w2,
                                                        const Optional& b1, const Optional& b1_up, const Optional& b2, const Optional& addend,
                                                        const Tensor& ids, const Tensor& weights, int64_t activation, double alpha, double limit,
                                                        bool interleaved, bool save_h) {
  const Launch launch(x);
  Layer l = make_layer(x, w1, w1_up, w2, b1, b1_up, b2, MACHMOE_TOPK, ids.size(1), ids.numel(), activation, alpha, limit, interleaved);
  size_t metadata_bytes = 0, unused = 0;
  check(machmoe_routing_bytes(&l.layer, 0, &metadata_bytes, &unused));
  const Tensor metadata = bytes(x, metadata_bytes);
  use_routing(l, metadata, std::nullopt, weights);
  auto [o, h] = forward(l, x, addend, save_h, &ids, launch.stream());
  return {o, h, metadata};
}

// Gradients in the shapes of the weights; those not wanted are undefined: None in Python.
struct WeightGrads {
  Tensor w1, w1_up, w2, b1, b1_up, b2;
  machmoe_weights views{};
};
WeightGrads new_weight_grads(const Tensor& w1, const Optional& w1_up, const Tensor& w2, const Optional& b1, const Optional& b1_up, const Optional& b2,
                             bool gated, bool interleaved, bool need_w1, bool need_w2, bool need_b1, bool need_b2) {
  const int32_t dtype = dtype_of(w1, "w1");
  const auto like3 = [&](const Tensor& t, bool need) { return need ? empty(t, {t.size(0), t.size(1), t.size(2)}, dtype) : Tensor(); };
  const auto like2 = [&](const Optional& t, bool need) { return need && t ? empty(*t, {t->size(0), t->size(1)}, dtype) : Tensor(); };
  WeightGrads g{like3(w1, need_w1),
                w1_up ? like3(*w1_up, need_w1) : Tensor(),
                like3(w2, need_w2),
                like2(b1, need_b1),
                like2(b1_up, need_b1),
                like2(b2, need_b2),
                {}};
  const auto optional = [](const Tensor& t) { return t.numel() ? Optional(t) : std::nullopt; };
  // Views of tensors that are not wanted keep a null base: the sizes come from w1 and w2 themselves.
  const machmoe_weights all = weight_views(need_w1 ? g.w1 : w1, need_w1 ? optional(g.w1_up) : w1_up, need_w2 ? g.w2 : w2, optional(g.b1),
                                           optional(g.b1_up), optional(g.b2), gated, interleaved);
  g.views = all;
  if (!need_w1) g.views.w1_gate = {}, g.views.w1_up = {};
  if (!need_w2) g.views.w2 = {};
  return g;
}

machmoe_backward_io backward_io(const Tensor& d_o, const Tensor& x, const Optional& h, bool over_h, const Tensor& dx, const Tensor& dscore,
                                int32_t dscore_dtype, const WeightGrads& g) {
  machmoe_backward_io io{};
  io.struct_size = sizeof io;
  io.x = data(x);
  io.h = data(h);
  io.d_o = data(d_o);
  io.dx = data(dx);
  io.dscore = data(dscore);
  io.dscore_dtype = dscore_dtype;
  io.grad_dtype = dtype_of(x, "x");
  io.dw1_gate = g.views.w1_gate, io.dw1_up = g.views.w1_up, io.dw2 = g.views.w2;
  io.db1_gate = g.views.b1_gate, io.db1_up = g.views.b1_up, io.db2 = g.views.b2;
  io.dh = over_h ? data(h) : nullptr;
  return io;
}
// For calls of these phases, one after the other.
Tensor backward_workspace(const machmoe_layer& layer, const Tensor& like, bool with_dh, std::initializer_list<uint32_t> calls, size_t& size) {
  size = 0;
  for (const uint32_t phases : calls) {
    size_t needed = 0;
    check(machmoe_backward_workspace_bytes(&layer, with_dh, phases, &needed));
    size = std::max(size, needed);
  }
  return workspace_of(like, size);
}

// kOverH: dH takes the place of h. score_dtype: of topk_weights or score; negative: its gradient is not wanted.
template <bool kOverH>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& d_o, const Tensor& x, const Tensor& w1, const Optional& w1_up, const Tensor& w2, const Optional& b1, const Optional& b1_up,
    const Optional& b2, const Optional& h, const Tensor& metadata, const Optional& counts, const Optional& score, int64_t kind, int64_t K,
    int64_t activation, double alpha, double limit, bool interleaved, bool need_dx, bool need_w1, bool need_w2, bool need_b1, bool need_b2,
    int64_t score_dtype) {
  const Launch launch(x);
  Layer l = make_layer(x, w1, w1_up, w2, b1, b1_up, b2, kind, K, row_capacity_of(x, score, kind, K), activation, alpha, limit, interleaved);
  use_routing(l, metadata, counts, score);
  const int64_t T = x.size(0);
  const WeightGrads g = new_weight_grads(w1, w1_up, w2, b1, b1_up, b2, is_gated(activation), interleaved, need_w1, need_w2, need_b1, need_b2);
  const Tensor dx = need_dx ? empty(x, {T, x.size(1)}, l.layer.dtype) : Tensor();
  const auto dscore_dtype = static_cast<int32_t>(score_dtype < 0 ? accum_of(l.layer.dtype) : score_dtype);
  const Tensor dscore = score_dtype < 0        ? Tensor()
                        : kind == MACHMOE_TOPK ? empty(x, {T, K}, dscore_dtype)
                                               : empty(x, {l.layer.row_capacity}, dscore_dtype);
  const Tensor d_rows = aligned(d_o), rows = aligned(x);
  const machmoe_backward_io io = backward_io(d_rows, rows, h, kOverH, dx, dscore, dscore_dtype, g);
  size_t workspace_bytes = 0;
  const Tensor workspace = backward_workspace(l.layer, x, io.dh != nullptr, {MACHMOE_PHASE_ALL}, workspace_bytes);
  check(machmoe_backward(&l.layer, &l.routing, &l.weights, &io, MACHMOE_PHASE_ALL, data(workspace), workspace_bytes, launch.stream()));
  return {dx, g.w1, g.w1_up, g.w2, g.b1, g.b1_up, g.b2, dscore};
}

// a b in the type of a. Through mm.out, which autocast leaves alone: in a backward under autocast the types stay those of the forward.
Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = empty(a, {a.size(0), b.size(1)}, dtype_of(a, "dlogits"));
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Experts and router together: dS is summed inside the router's backward, and the router's dX is the addend of the experts' dX.
template <bool kOverH>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const Tensor& d_o, const Optional& daux, const Tensor& x, const Tensor& router_w, const Tensor& w1, const Optional& w1_up, const Tensor& w2,
    const Optional& b1, const Optional& b1_up, const Optional& b2, const Optional& h, const Tensor& metadata, const Tensor& logits, const Tensor& ids,
    const Tensor& weights, const Tensor& route_counts, int64_t router, int64_t activation, double alpha, double limit, bool interleaved, bool need_w1,
    bool need_w2, bool need_b1, bool need_b2) {
  const Launch launch(x);
  const int64_t K = ids.size(1);
  Layer l = make_layer(x, w1, w1_up, w2, b1, b1_up, b2, MACHMOE_TOPK, K, ids.numel(), activation, alpha, limit, interleaved);
  use_routing(l, metadata, std::nullopt, weights);
  const WeightGrads g = new_weight_grads(w1, w1_up, w2, b1, b1_up, b2, is_gated(activation), interleaved, need_w1, need_w2, need_b1, need_b2);
  const Tensor dx = empty(x, {x.size(0), x.size(1)}, l.layer.dtype);
  const Tensor d_rows = aligned(d_o), rows = aligned(x);
  machmoe_backward_io io = backward_io(d_rows, rows, h, kOverH, dx, Tensor(), accum_of(l.layer.dtype), g);
  size_t workspace_bytes = 0;
  constexpr uint32_t kFirst = MACHMOE_PHASE_ACTIVATION, kLast = MACHMOE_PHASE_WEIGHT | MACHMOE_PHASE_INPUT;
  const Tensor workspace = backward_workspace(l.layer, x, io.dh != nullptr, {kFirst, kLast}, workspace_bytes);
  const auto run = [&](uint32_t phases) {
    check(machmoe_backward(&l.layer, &l.routing, &l.weights, &io, phases, data(workspace), workspace_bytes, launch.stream()));
  };
  run(kFirst);
  const Tensor dlogits = empty(logits, {logits.size(0), logits.size(1)}, dtype_of(logits, "logits"));
  const machmoe_route r = route_descriptor(logits, router, K, ids, weights, route_counts);
  const machmoe_route_grad route_grad{sizeof route_grad, nullptr, data(daux), data(dlogits)};
  check(machmoe_route_backward(&r, &route_grad, &l.layer, &l.routing, data(workspace), launch.stream()));
  const Tensor router_dx = product(dlogits, router_w);
  const Tensor drouter_w = product(torch::stable::transpose(dlogits, 0, 1), x);
  io.addend = data(router_dx);
  run(kLast);
  return {dx, drouter_w, g.w1, g.w1_up, g.w2, g.b1, g.b1_up, g.b2};
}

// ---- library -------------------------------------------------------------------------------------------------------------------
std::string build_info() { return machmoe_build_info(); }
std::string device_reason(bool cuda) { return machmoe_device_reason(cuda ? MACHMOE_CUDA : MACHMOE_CPU); }

}  // namespace

STABLE_TORCH_LIBRARY(machmoe, m) {
  m.def("routing_lists(Tensor token_ids, Tensor expert_ids, Tensor scores, SymInt num_tokens, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("routing_rows(Tensor counts, Tensor rows) -> Tensor");
  m.def("token_round(Tensor scores, int k, int tile, int rule, bool renormalize, Tensor seed) -> (Tensor, Tensor)");
  m.def("token_round_backward(Tensor d_score, Tensor scores, Tensor metadata, Tensor expert, bool renormalize) -> Tensor");
  m.def("route_forward(Tensor logits, int k, int router) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("route_backward(Tensor dweights, Tensor? daux, Tensor logits, Tensor ids, Tensor weights, Tensor counts, int router) -> Tensor");
  m.def(
      "experts_forward(Tensor x, Tensor w1, Tensor? w1_up, Tensor w2, Tensor? b1, Tensor? b1_up, Tensor? b2, Tensor? addend, Tensor metadata, "
      "Tensor? counts, "
      "Tensor? score, int kind, int activation, float alpha, float limit, bool interleaved, bool save_h) -> (Tensor, Tensor)");
  m.def(
      "topk_experts_forward(Tensor x, Tensor w1, Tensor? w1_up, Tensor w2, Tensor? b1, Tensor? b1_up, Tensor? b2, Tensor? addend, Tensor ids, "
      "Tensor weights, int activation, float alpha, float limit, bool interleaved, bool save_h) -> (Tensor, Tensor, Tensor)");
  // With a _ behind the name they write dH over h.
  for (const auto& [mark, h] : {std::pair{"", "Tensor? h, "}, {"_", "Tensor(a!)? h, "}}) {
    const std::string weights = "Tensor w1, Tensor? w1_up, Tensor w2, Tensor? b1, Tensor? b1_up, Tensor? b2, ",
                      options = "int activation, float alpha, float limit, bool interleaved, ",
                      need = "bool need_w1, bool need_w2, bool need_b1, bool need_b2",
                      results = ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
    m.def(("experts_backward" + std::string(mark) + "(Tensor d_o, Tensor x, " + weights + h +
           "Tensor metadata, Tensor? counts, Tensor? score, int kind, int k, " + options + "bool need_dx, " + need + ", int score_dtype" + results)
              .c_str());
    m.def(("layer_backward" + std::string(mark) + "(Tensor d_o, Tensor? daux, Tensor x, Tensor router_w, " + weights + h +
           "Tensor metadata, Tensor logits, Tensor ids, Tensor weights, Tensor route_counts, int router, " + options + need + results)
              .c_str());
  }
  m.def("build_info() -> str");
  m.def("device_reason(bool cuda) -> str");
}

#define MACHMOE_IMPLEMENT(m)                                        \
  m.impl("routing_lists", TORCH_BOX(&routing_lists));               \
  m.impl("routing_rows", TORCH_BOX(&routing_rows));                 \
  m.impl("token_round", TORCH_BOX(&token_round));                   \
  m.impl("token_round_backward", TORCH_BOX(&token_round_backward)); \
  m.impl("route_forward", TORCH_BOX(&route_forward));               \
  m.impl("route_backward", TORCH_BOX(&route_backward));             \
  m.impl("topk_experts_forward", TORCH_BOX(&topk_experts_forward)); \
  m.impl("experts_forward", TORCH_BOX(&experts_forward));           \
  m.impl("experts_backward", TORCH_BOX(&experts_backward<false>));  \
  m.impl("experts_backward_", TORCH_BOX(&experts_backward<true>));  \
  m.impl("layer_backward", TORCH_BOX(&layer_backward<false>));      \
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<true>));

STABLE_TORCH_LIBRARY_IMPL(machmoe, CPU, m){MACHMOE_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(machmoe, CUDA, m){
    MACHMOE_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(machmoe, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("device_reason", TORCH_BOX(&device_reason));
}
