// The C ABI as a contract: versions, sizes, errors. 10,000 malformed calls get a status and a sentence; none writes outside its buffers.
#include <gmock/gmock.h>

#include "layer.h"

namespace machmoe::test {
namespace {

using testing::HasSubstr;

TEST(CApi, TellsItsVersionAndDevices) {
  int major = -1, minor = -1, patch = -1;
  machmoe_version(&major, &minor, &patch);
  EXPECT_EQ(major, MACHMOE_VERSION_MAJOR);
  EXPECT_EQ(minor, MACHMOE_VERSION_MINOR);
  EXPECT_EQ(patch, MACHMOE_VERSION_PATCH);
  EXPECT_EQ(machmoe_device_available(MACHMOE_CPU), 1);
  EXPECT_STREQ(machmoe_device_reason(MACHMOE_CPU), "");
  EXPECT_EQ(machmoe_device_available(MACHMOE_CUDA) == 1, std::string(machmoe_device_reason(MACHMOE_CUDA)).empty());
  EXPECT_THAT(machmoe_build_info(), HasSubstr("machmoe 0.1.0"));
}

TEST(CApi, AFailureLeavesASentenceAndASuccessClearsIt) {
  machmoe_layer layer = layer_of({.T = 4, .d = 12, .n = 8, .E = 2, .K = 1, .R_cap = 4, .dtype = DType::F32});
  size_t bytes = 0;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_forward_workspace_bytes(&layer, &bytes));
  EXPECT_STREQ(machmoe_last_error(), "d is 12, expected a multiple of 8 in 8 .. 2^24: pad the hidden size");
  layer.d = 16;
  EXPECT_EQ(MACHMOE_OK, machmoe_forward_workspace_bytes(&layer, &bytes));
  EXPECT_STREQ(machmoe_last_error(), "");
}

TEST(CApi, DescriptorsAreVersionedByTheirSize) {
  machmoe_layer layer = layer_of({.T = 4, .d = 8, .n = 8, .E = 2, .K = 1, .R_cap = 4, .dtype = DType::F32});
  size_t bytes = 0;
  layer.struct_size = 0;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_forward_workspace_bytes(&layer, &bytes));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("layer.struct_size is 0"));
  layer.struct_size = sizeof layer + 8;
  EXPECT_EQ(MACHMOE_UNSUPPORTED, machmoe_forward_workspace_bytes(&layer, &bytes));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("newer machmoe"));
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_forward_workspace_bytes(nullptr, &bytes));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("layer is null"));
}

TEST(CApi, ACudaLayerWithoutAGpuSaysWhy) {
  if (machmoe_device_available(MACHMOE_CUDA)) return;
  machmoe_layer layer = layer_of({.T = 4, .d = 8, .n = 8, .E = 2, .K = 1, .R_cap = 4});
  layer.device = MACHMOE_CUDA;
  size_t bytes = 0;
  EXPECT_EQ(MACHMOE_UNSUPPORTED, machmoe_forward_workspace_bytes(&layer, &bytes));
  EXPECT_THAT(machmoe_last_error(), HasSubstr(machmoe_device_reason(MACHMOE_CUDA)));
}

// A valid forward call whose pieces a test can break.
struct Call {
  Problem p;
  machmoe_layer layer = layer_of(p.shape);
  RoutingBuffer routing;
  WeightSet weights = weights_of(p);
  Tensor h{DType::F32, static_cast<size_t>(p.shape.R_cap * 2 * p.shape.n)}, o{DType::F32, static_cast<size_t>(p.shape.T*p.shape.d)}, dx = o;
  WeightSet grads = WeightSet::make(p.shape, p.c.layout, true, DType::F32);
  machmoe_forward_io forward{sizeof forward, p.x.data(), nullptr, h.data(), o.data()};
  machmoe_backward_io backward{};
  Buffer workspace{1 << 20};
  size_t workspace_bytes = workspace.size();

  explicit Call(int64_t E = 3, int64_t K = 2) : p(make_problem({.name = "Call", .T = 6, .d = 8, .n = 8, .E = E, .K = K, .bias = true}, DType::F32)) {
    build_routing(p, routing);
    backward.struct_size = sizeof backward;
    backward.x = p.x.data(), backward.h = h.data(), backward.d_o = p.d_o.data(), backward.dx = dx.data();
    backward.dw1_gate = grads.views.w1_gate, backward.dw1_up = grads.views.w1_up, backward.dw2 = grads.views.w2;
    backward.db1_gate = grads.views.b1_gate, backward.db1_up = grads.views.b1_up, backward.db2 = grads.views.b2;
  }
  machmoe_status run_forward() {
    return machmoe_forward(&layer, &routing.views, &weights.views, &forward, workspace.data(), workspace_bytes, nullptr);
  }
  machmoe_status run_backward() {
    return machmoe_backward(&layer, &routing.views, &weights.views, &backward, MACHMOE_PHASE_ALL, workspace.data(), workspace_bytes, nullptr);
  }
};

TEST(CApi, NamesTheArgumentThatIsWrong) {
  const auto fails_with = [](const char* words, auto&& mutate) {
    Call call;
    ASSERT_EQ(MACHMOE_OK, call.run_forward()) << machmoe_last_error();
    ASSERT_EQ(MACHMOE_OK, call.run_backward()) << machmoe_last_error();
    mutate(call);
    const machmoe_status status = call.run_forward() == MACHMOE_OK ? call.run_backward() : MACHMOE_INVALID_ARGUMENT;
    EXPECT_NE(MACHMOE_OK, status);
    EXPECT_THAT(machmoe_last_error(), HasSubstr(words));
  };
  fails_with("x is null", [](Call& c) { c.forward.x = nullptr; });
  fails_with("o is null", [](Call& c) { c.forward.o = nullptr; });
  fails_with("w1_gate is null", [](Call& c) { c.weights.views.w1_gate.base = nullptr; });
  fails_with("w1_up.row_stride is 7", [](Call& c) { c.weights.views.w1_up.row_stride = 7; });
  fails_with("w2.expert_stride is 3", [](Call& c) { c.weights.views.w2.expert_stride = 3; });
  constexpr int64_t kFar = int64_t{1} << 61;  // seven rows of it are more than 2^63
  fails_with("w2.row_stride is 2305843009213693952, expected 8 .. 68719476736", [](Call& c) { c.weights.views.w2.row_stride = kFar; });
  fails_with("w2.expert_stride is 2305843009213693952, expected 64 .. 549755813888", [](Call& c) { c.weights.views.w2.expert_stride = kFar; });
  fails_with("b1_up.stride is 2305843009213693952", [](Call& c) { c.weights.views.b1_up.stride = kFar; });
  fails_with("dw1_gate.row_stride is 2305843009213693952", [](Call& c) { c.backward.dw1_gate.row_stride = kFar; });
  fails_with("b1_gate is null and b1_up is given", [](Call& c) { c.weights.views.b1_gate.base = nullptr; });
  fails_with("this activation has no gate", [](Call& c) { c.layer.activation = MACHMOE_GELU; });
  fails_with("activation is 99", [](Call& c) { c.layer.activation = 99; });
  fails_with("dtype is 2", [](Call& c) { c.layer.dtype = MACHMOE_F16; });
  fails_with("row_capacity is 11", [](Call& c) { c.layer.row_capacity = 11; });
  fails_with("routing.score is null, expected the top-K weights", [](Call& c) { c.routing.views.score = nullptr; });
  fails_with("K is 4294967296, expected 1 .. 2^31 - 1", [](Call& c) { c.layer.K = int64_t{1} << 32; });
  fails_with("routing.slot is given, expected null", [](Call& c) {
    c.layer.routing_kind = MACHMOE_LISTS;
    c.routing.views.token = c.routing.views.slot;
  });
  fails_with("routing.inverse is null", [](Call& c) { c.routing.views.inverse = nullptr; });
  fails_with("workspace has 16 bytes", [](Call& c) { c.workspace_bytes = 16; });
  fails_with("d_o is null", [](Call& c) { c.backward.d_o = nullptr; });
  fails_with("grad_dtype is 1", [](Call& c) { c.backward.grad_dtype = MACHMOE_BF16; });
  fails_with("dw1_up is null", [](Call& c) { c.backward.dw1_up = {}; });
  fails_with("dw1_gate is null", [](Call& c) { c.backward.dw1_gate = {}; });
  fails_with("db1_gate is given and db1_up is null", [](Call& c) { c.backward.db1_up = {}, c.backward.db2 = {}; });
  fails_with("db1_gate is null and db1_up is given", [](Call& c) { c.backward.db1_gate = {}; });
  fails_with("io.grad_dtype is 17", [](Call& c) { c.backward.grad_dtype = 17; });
}

TEST(CApi, OneExpertMayHaveAnyExpertStride) {
  Call usual(1, 1);
  ASSERT_EQ(MACHMOE_OK, usual.run_forward()) << machmoe_last_error();
  ASSERT_EQ(MACHMOE_OK, usual.run_backward()) << machmoe_last_error();
  for (const int64_t stride : {int64_t{0}, int64_t{1}, int64_t{-8}, INT64_MAX}) {
    Call c(1, 1);
    machmoe_weights& w = c.weights.views;
    machmoe_backward_io& g = c.backward;
    for (machmoe_matrix* m : {&w.w1_gate, &w.w1_up, &w.w2, &g.dw1_gate, &g.dw1_up, &g.dw2}) m->expert_stride = stride;
    for (machmoe_vector* v : {&w.b1_gate, &w.b1_up, &w.b2, &g.db1_gate, &g.db1_up, &g.db2}) v->expert_stride = stride;
    ASSERT_EQ(MACHMOE_OK, c.run_forward()) << machmoe_last_error();
    ASSERT_EQ(MACHMOE_OK, c.run_backward()) << machmoe_last_error();
    EXPECT_TRUE(c.o == usual.o && c.dx == usual.dx && c.grads.w1 == usual.grads.w1 && c.grads.w2 == usual.grads.w2 && c.grads.b1 == usual.grads.b1 &&
                c.grads.b2 == usual.grads.b2)
        << stride;
  }
}

TEST(CApi, NoDescriptorIsShorterThanInTheFirstVersion) {
  Call c;
  machmoe_route route{.struct_size = sizeof route, .E = 1, .K = 1};
  machmoe_route_grad grad{.struct_size = sizeof grad};
  machmoe_token_round_options options{.struct_size = sizeof options};
  const auto one_byte_less = [](const char* name, size_t size, size_t& struct_size, auto&& call) {
    struct_size = size - 1;
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, call());
    EXPECT_THAT(machmoe_last_error(), HasSubstr(fmt::format("{}.struct_size is {}, expected sizeof", name, size - 1)));
    struct_size = size;
  };
  const auto forward = [&] { return c.run_forward(); };
  const auto route_backward = [&] { return machmoe_route_backward(&route, &grad, nullptr, nullptr, nullptr, nullptr); };
  one_byte_less("layer", 80, c.layer.struct_size, forward);
  one_byte_less("weights", 152, c.weights.views.struct_size, forward);
  one_byte_less("routing", 80, c.routing.views.struct_size, forward);
  one_byte_less("io", 56, c.forward.struct_size, forward);
  one_byte_less("io", 224, c.backward.struct_size, [&] { return c.run_backward(); });
  one_byte_less("route", 88, route.struct_size, route_backward);
  one_byte_less("grad", 32, grad.struct_size, route_backward);
  one_byte_less("options", 40, options.struct_size,
                [&] { return machmoe_token_round(&c.layer, &options, nullptr, &c.routing.views, nullptr, 0, nullptr); });
}

TEST(CApi, CarveWritesWhatTheCallerKnows) {
  const machmoe_layer layer = layer_of({.T = 4, .d = 8, .n = 8, .E = 2, .K = 1, .R_cap = 4, .dtype = DType::F32});
  size_t bytes = 0, scratch = 0;
  ASSERT_EQ(MACHMOE_OK, machmoe_routing_bytes(&layer, 0, &bytes, &scratch));
  Buffer metadata(bytes);
  machmoe_routing out{.struct_size = sizeof out};
  for (const auto& [size, status] :
       {std::pair{size_t{0}, MACHMOE_INVALID_ARGUMENT}, {sizeof out - 8, MACHMOE_INVALID_ARGUMENT}, {sizeof out + 8, MACHMOE_UNSUPPORTED}}) {
    out.struct_size = size;
    EXPECT_EQ(status, machmoe_routing_carve(&layer, 0, metadata.data(), &out));
    EXPECT_THAT(machmoe_last_error(), HasSubstr(fmt::format("out.struct_size is {}", size)));
    EXPECT_EQ(out.struct_size, size);
    EXPECT_EQ(out.counts, nullptr);
  }
  out.struct_size = sizeof out;
  EXPECT_EQ(MACHMOE_OK, machmoe_routing_carve(&layer, 0, metadata.data(), &out));
  EXPECT_EQ(out.struct_size, sizeof out);
  EXPECT_NE(out.counts, nullptr);
}

TEST(CApi, WorkspaceAndMetadataAreAligned) {
  Call c;
  void* const shifted = static_cast<std::byte*>(c.workspace.data()) + 8;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT,
            machmoe_forward(&c.layer, &c.routing.views, &c.weights.views, &c.forward, shifted, c.workspace_bytes - 8, nullptr));
  EXPECT_THAT(machmoe_last_error(), testing::ContainsRegex("workspace is at .*8, expected an address that is a multiple of 16 bytes"));
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_routing_carve(&c.layer, 1, shifted, &c.routing.views));
  EXPECT_THAT(machmoe_last_error(), testing::ContainsRegex("metadata is at .*8, expected an address that is a multiple of 16 bytes"));
}

TEST(CApi, TheBackwardReadsTheWeightsAgain) {
  Call c;
  ASSERT_EQ(MACHMOE_OK, c.run_forward());
  c.routing.views.score = nullptr;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, c.run_backward());
  EXPECT_THAT(machmoe_last_error(), HasSubstr("routing.score is null"));
}

TEST(CApi, WithoutWeightsNothingIsWritten) {
  Call c;
  c.routing.views.score = nullptr;
  const Tensor untouched = c.h;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, c.run_forward());
  EXPECT_EQ(c.h, untouched);
}

TEST(CApi, PhasesAreASumOfTheThree) {
  Call c;
  size_t bytes = 0;
  for (uint32_t phases : {0u, 8u}) {
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT,
              machmoe_backward(&c.layer, &c.routing.views, &c.weights.views, &c.backward, phases, c.workspace.data(), c.workspace_bytes, nullptr));
    EXPECT_THAT(machmoe_last_error(), HasSubstr(fmt::format("phases is {}", phases)));
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_backward_workspace_bytes(&c.layer, 0, phases, &bytes));
    EXPECT_THAT(machmoe_last_error(), HasSubstr(fmt::format("phases is {}", phases)));
  }
}

// One field of one descriptor is overwritten with a hostile value before each call. Values that stay valid may succeed.
TEST(CApi, MalformedCallsGetAStatusAndASentence) {
  Random random(7);
  const int64_t hostile[] = {0, -1, 1, 7, 8, 13, 1 << 20, int64_t{1} << 31, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  const auto pick = [&] { return hostile[random.below(std::size(hostile))]; };
  int failures = 0;
  for (int i = 0; i < 10000; i++) {
    Call call;
    void* const null = nullptr;
    switch (random.below(16)) {
      case 0: call.layer.T = pick(); break;
      case 1: call.layer.d = std::max<int64_t>(pick(), 9); break;
      case 2: call.layer.n = std::max<int64_t>(pick(), 9); break;
      case 3: call.layer.E = std::min<int64_t>(pick(), 0); break;
      case 4: call.layer.K = pick(); break;
      case 5: call.layer.row_capacity = pick(); break;
      case 6: call.layer.routing_kind = static_cast<int32_t>(3 + random.below(100)); break;
      case 7: call.layer.activation = static_cast<int32_t>(random.below(2) ? -1 - random.below(9) : 9 + random.below(99)); break;
      case 8: call.layer.dtype = std::array{-1, 2, 4, 5, 6, 100}[static_cast<size_t>(random.below(6))]; break;
      case 9: call.weights.views.w1_up.row_stride = std::min<int64_t>(pick(), 7); break;
      case 10: call.weights.views.w2.expert_stride = std::min<int64_t>(pick(), 7); break;
      case 11: call.workspace_bytes = static_cast<size_t>(random.below(1000)); break;
      case 12: std::memcpy(&call.forward.x, &null, sizeof null); break;
      case 13: call.weights.views.struct_size = static_cast<size_t>(random.below(sizeof(machmoe_weights))); break;
      case 14: call.routing.views.slot = nullptr; break;
      case 15: call.layer.struct_size = static_cast<size_t>(random.below(sizeof(machmoe_layer))); break;
    }
    const machmoe_status status = call.run_forward();
    if (status == MACHMOE_OK) continue;
    failures++;
    ASSERT_STRNE(machmoe_last_error(), "");
    ASSERT_NE(status, MACHMOE_INTERNAL_ERROR) << machmoe_last_error();
  }
  EXPECT_GT(failures, 8000);
}

}  // namespace
}  // namespace machmoe::test
