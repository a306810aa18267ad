// Fuzz target over C descriptors and routings: whatever the bytes say, a call returns a status, a failure has a sentence, and nothing outside
// the buffers is touched. With clang: -fsanitize=fuzzer,address. With any other compiler the file has a main that feeds it random bytes.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "machmoe/machmoe.h"

namespace {

// Reads values from the input; past its end everything is zero.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  // Small sizes most of the time, hostile ones now and then.
  int64_t size(int64_t typical, int64_t unit = 1) {
    constexpr int64_t hostile[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 31, int64_t{1} << 62};
    const uint8_t b = byte();
    return b < 250 ? b % (typical + 1) * unit : hostile[b - 250 < 5 ? b - 250 : 0];
  }
  int32_t code(int32_t last) {
    const uint8_t b = byte();
    return b < 248 ? b % (last + 1) : static_cast<int32_t>(b * 0x01010101u);
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}
bool ok(machmoe_status status) {
  require(status == MACHMOE_OK || *machmoe_last_error(), "a failure has a sentence");
  require(status != MACHMOE_INTERNAL_ERROR, "no internal error");
  return status == MACHMOE_OK;
}
constexpr int64_t kLimit = 4096;  // elements: calls beyond it are only asked for their sizes

// Token rounding and its gradient: a rounded routing is whole, its gradient is 0 outside the kept pairs.
void round_tokens(Input& in, machmoe_layer layer) {
  machmoe_token_round_options options{};
  options.struct_size = in.byte() < 250 ? sizeof options : in.byte();
  options.K = in.size(4), options.tile = in.size(8);
  options.rule = in.code(5), options.renormalize = in.code(1);
  int64_t capacity = 0;
  if (!ok(machmoe_rounded_capacity(layer.T, layer.E, options.K, options.tile, options.rule, &capacity))) return;
  layer.routing_kind = MACHMOE_LISTS;
  layer.row_capacity = in.byte() < 250 ? capacity : in.size(40);
  size_t metadata_bytes = 0, routing_scratch = 0, workspace_bytes = 0;
  if (!ok(machmoe_routing_bytes(&layer, 1, &metadata_bytes, &routing_scratch)) || !ok(machmoe_token_round_workspace_bytes(&layer, &workspace_bytes)))
    return;
  if (layer.T > kLimit || layer.row_capacity > kLimit || layer.E > 64) return;
  std::vector<uint8_t> metadata(metadata_bytes + 16), workspace(workspace_bytes + 16);
  machmoe_routing routing{.struct_size = sizeof routing};
  if (!ok(machmoe_routing_carve(&layer, 1, metadata.data(), &routing))) return;
  const auto pairs = static_cast<size_t>(layer.T * layer.E);
  std::vector<float> scores(pairs), dscores(pairs, -1.f), dscore(static_cast<size_t>(layer.row_capacity), 1.f);
  for (float& score : scores) score = static_cast<float>(in.byte()) / 250.f;  // a few above 1
  if (!ok(machmoe_token_round(&layer, &options, scores.data(), &routing, workspace.data(), workspace_bytes, nullptr))) return;
  const int32_t R = routing.offsets[layer.E];
  require(R >= 0 && R <= layer.row_capacity && routing.token_offsets[layer.T] == R, "a rounded routing fits its capacity");
  if (!ok(machmoe_token_round_backward(&layer, options.renormalize, scores.data(), &routing, dscore.data(), dscores.data(), nullptr))) return;
  size_t kept = 0;
  for (const float d : dscores) {
    require(d > -1e-3f, "a gradient is written, and of equal row gradients none is negative");
    kept += d != 0.f;
  }
  require(kept <= static_cast<size_t>(R), "a gradient is 0 where a pair was not kept");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  machmoe_layer layer{};
  layer.struct_size = in.byte() < 250 ? sizeof layer : in.byte();
  layer.dtype = in.code(3);
  layer.activation = in.code(8);
  layer.routing_kind = in.code(2);
  layer.T = in.size(12);
  layer.d = in.size(3, 8);
  layer.n = in.size(3, 8);
  layer.E = in.size(5);
  layer.K = in.size(4);
  layer.row_capacity =
      in.byte() < 200
          ? (layer.routing_kind == MACHMOE_ROWS ? layer.T : static_cast<int64_t>(static_cast<uint64_t>(layer.T) * static_cast<uint64_t>(layer.K)))
          : in.size(40);
  size_t metadata_bytes = 0, scratch_bytes = 0, forward_bytes = 0, backward_bytes = 0;
  if (!ok(machmoe_routing_bytes(&layer, 1, &metadata_bytes, &scratch_bytes))) return 0;
  if (!ok(machmoe_forward_workspace_bytes(&layer, &forward_bytes)) ||
      !ok(machmoe_backward_workspace_bytes(&layer, 0, MACHMOE_PHASE_ALL, &backward_bytes)))
    return 0;
  if (layer.T > kLimit || layer.row_capacity > kLimit || layer.E > 64 || layer.d > 64 || layer.n > 64) return 0;
  if (in.byte() % 4 == 0) {
    round_tokens(in, layer);
    return 0;
  }

  const size_t element = layer.dtype == MACHMOE_F64 ? 8 : layer.dtype == MACHMOE_F32 ? 4 : 2, accum = layer.dtype == MACHMOE_F64 ? 8 : 4;
  const auto bytes = [](int64_t count, size_t each) { return std::vector<uint8_t>(static_cast<size_t>(count) * each, 0); };
  std::vector<uint8_t> metadata(metadata_bytes + 16), scratch(scratch_bytes + 16);
  machmoe_routing routing{.struct_size = sizeof routing};
  if (metadata_bytes == 0 || !ok(machmoe_routing_carve(&layer, 1, metadata.data(), &routing))) return 0;
  const auto R = static_cast<size_t>(layer.row_capacity);
  std::vector<int32_t> tokens(R), experts(R);
  for (size_t i = 0; i < R; i++) {
    tokens[i] = static_cast<int32_t>(in.size(layer.T));
    experts[i] = static_cast<int32_t>(in.size(layer.E));
  }
  std::vector<uint8_t> scores = bytes(layer.row_capacity, accum);
  machmoe_status status = MACHMOE_OK;
  if (layer.routing_kind == MACHMOE_TOPK) {
    routing.score = scores.data();
    status = machmoe_routing_from_topk(&layer, experts.data(), MACHMOE_I32, &routing, scratch.data(), scratch_bytes, nullptr);
  } else if (layer.routing_kind == MACHMOE_LISTS) {
    status = machmoe_routing_from_lists(&layer, tokens.data(), experts.data(), MACHMOE_I32, scores.data(), nullptr, &routing, scratch.data(),
                                        scratch_bytes, nullptr);
  } else {
    for (int64_t e = 0; e < layer.E; e++) routing.counts[e] = static_cast<int32_t>(in.size(6));
    status = machmoe_routing_complete(&layer, &routing, scratch.data(), scratch_bytes, nullptr);
  }
  if (!ok(status)) return 0;

  const int64_t planes = layer.activation <= MACHMOE_REGLU ? 2 : 1, nd = layer.n * layer.d;
  std::vector<uint8_t> x = bytes(layer.T * layer.d, element), o = x, dx = x, d_o = x, h = bytes(layer.row_capacity * planes * layer.n, element);
  std::vector<uint8_t> w1 = bytes(layer.E * planes * nd, element), w2 = bytes(layer.E * nd, element), dw1 = w1, dw2 = w2;
  const auto views = [&](uint8_t* first, uint8_t* second) {
    machmoe_weights w{};
    w.struct_size = sizeof w;
    if (planes == 2) w.w1_gate = {first, layer.d, 2 * nd};
    w.w1_up = {first + static_cast<size_t>((planes - 1) * nd) * element, layer.d, planes * nd};
    w.w2 = {second, layer.n, nd};
    return w;
  };
  const machmoe_weights weights = views(w1.data(), w2.data()), grads = views(dw1.data(), dw2.data());
  std::vector<uint8_t> workspace(std::max(forward_bytes, backward_bytes) + 16);
  const size_t given = in.byte() < 250 ? workspace.size() - 16 : in.byte();
  const machmoe_forward_io forward{sizeof forward, x.data(), nullptr, h.data(), o.data()};
  ok(machmoe_forward(&layer, &routing, &weights, &forward, workspace.data(), given, nullptr));
  machmoe_backward_io backward{};
  backward.struct_size = sizeof backward;
  backward.x = x.data(), backward.h = h.data(), backward.d_o = d_o.data(), backward.dx = dx.data();
  backward.grad_dtype = in.byte() < 250 ? layer.dtype : in.code(5);
  backward.dw1_gate = grads.w1_gate, backward.dw1_up = grads.w1_up, backward.dw2 = grads.w2;
  if (backward.grad_dtype == layer.dtype)  // the gradients have room for this type
    ok(machmoe_backward(&layer, &routing, &weights, &backward, in.byte() < 250 ? uint32_t{MACHMOE_PHASE_ALL} : uint32_t{in.byte()}, workspace.data(),
                        given, nullptr));
  return 0;
}

#ifndef MACHMOE_LIBFUZZER
int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 20000;
  std::mt19937_64 engine(1);
  std::vector<uint8_t> bytes;
  for (int i = 0; i < runs; i++) {
    bytes.resize(engine() % 128);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(engine());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%d inputs, every call returned a status\n", runs);
}
#endif
