// Routing metadata through the C ABI: what from_topk, from_lists and complete promise, and the errors of bad routings.
#include <gmock/gmock.h>

#include <map>

#include "core/divisor.h"
#include "layer.h"

namespace machmoe::test {
namespace {

using testing::HasSubstr;

// Every promise of src/ops.h about a routing, checked against the pairs of the problem.
void expect_complete(const Problem& p, const RoutingBuffer& b) {
  const Shape& s = p.shape;
  const machmoe_routing& r = b.views;
  ASSERT_EQ(r.offsets[0], 0);
  for (int64_t e = 0; e < s.E; e++) {
    ASSERT_EQ(r.counts[e], p.counts[static_cast<size_t>(e)]);
    ASSERT_EQ(r.offsets[e + 1], r.offsets[e] + r.counts[e]);
  }
  const int64_t R = r.offsets[s.E];
  ASSERT_EQ(R, static_cast<int64_t>(p.pairs.size()));
  if (s.kind == RoutingKind::Rows) return;

  const bool topk = s.kind == RoutingKind::TopK;
  const auto token_of = [&](int64_t row) -> int64_t { return topk ? r.slot[row] / s.K : r.token[row]; };
  std::map<std::pair<int64_t, int64_t>, const Pair*> pairs;
  for (const Pair& pair : p.pairs) pairs[{pair.token, pair.expert}] = &pair;
  for (int64_t e = 0; e < s.E; e++) {
    for (int64_t row = r.offsets[e]; row < r.offsets[e + 1]; row++) {
      ASSERT_EQ(r.expert[row], e);
      ASSERT_TRUE(row == r.offsets[e] || token_of(row - 1) < token_of(row)) << "tokens ascend inside an expert";
      ASSERT_TRUE(pairs.count({token_of(row), e}));
      const Pair& pair = *pairs[{token_of(row), e}];
      ASSERT_EQ(b.order[static_cast<size_t>(row)], pair.slot);
      ASSERT_EQ(static_cast<const float*>(r.score)[topk ? r.slot[row] : row], static_cast<float>(pair.score));
      if (topk) { ASSERT_EQ(r.inverse[pair.slot], row); }
    }
  }
  if (topk) {
    ASSERT_EQ(std::count(r.inverse, r.inverse + s.R_cap, -1), s.R_cap - R);
    ASSERT_EQ(std::count(r.slot + R, r.slot + s.R_cap, 0), s.R_cap - R) << "rows past R name a slot that is there";
    return;
  }
  for (int64_t row = R; row < s.R_cap; row++) ASSERT_EQ(b.order[static_cast<size_t>(row)], -1);
  ASSERT_EQ(r.token_offsets[0], 0);
  ASSERT_EQ(r.token_offsets[s.T], R);
  for (int64_t t = 0; t < s.T; t++)
    for (int32_t i = r.token_offsets[t]; i < r.token_offsets[t + 1]; i++) {
      ASSERT_EQ(r.token[r.inverse[i]], t);
      ASSERT_TRUE(i == r.token_offsets[t] || r.inverse[i - 1] < r.inverse[i]) << "rows ascend inside a token";
    }
}

class RoutingTest : public testing::TestWithParam<Case> {};
TEST_P(RoutingTest, GroupsRowsByExpertAndInvertsTheMap) {
  const Problem p = make_problem(GetParam(), DType::F32);
  RoutingBuffer b;
  ASSERT_NO_FATAL_FAILURE(build_routing(p, b));
  expect_complete(p, b);
}
INSTANTIATE_TEST_SUITE_P(CaseTable, RoutingTest, testing::ValuesIn(case_table()), [](const auto& test) { return test.param.name; });

struct TopkCall {
  machmoe_layer layer;
  std::vector<uint8_t> metadata, scratch;
  machmoe_routing out{.struct_size = sizeof out};
  explicit TopkCall(int64_t T, int64_t E, int64_t K)
      : layer(layer_of({.T = T, .d = 8, .n = 8, .E = E, .K = K, .R_cap = T * K, .dtype = DType::F32})) {
    size_t bytes = 0, scratch_bytes = 0;
    EXPECT_EQ(MACHMOE_OK, machmoe_routing_bytes(&layer, 1, &bytes, &scratch_bytes));
    metadata.resize(bytes);
    scratch.resize(scratch_bytes);
    EXPECT_EQ(MACHMOE_OK, machmoe_routing_carve(&layer, 1, metadata.data(), &out));
  }
  template <class Id>
  machmoe_status run(const std::vector<Id>& ids) {
    return machmoe_routing_from_topk(&layer, ids.data(), sizeof(Id) == 8 ? MACHMOE_I64 : MACHMOE_I32, &out, scratch.data(), scratch.size(), nullptr);
  }
};

TEST(Routing, ReadsInt64Ids) {
  TopkCall call(2, 4, 2);
  ASSERT_EQ(MACHMOE_OK, call.run(std::vector<int64_t>{3, 1, int64_t{1} << 40, 3}));
  EXPECT_THAT(std::vector(call.out.slot, call.out.slot + 3), testing::ElementsAre(1, 0, 3));
  EXPECT_THAT(std::vector(call.out.inverse, call.out.inverse + 4), testing::ElementsAre(1, 0, -1, 2));
}

TEST(Routing, QuotientsByProductAndShiftAreExact) {
  for (uint32_t d : {1u, 2u, 3u, 5u, 6u, 7u, 8u, 10u, 12u, 100u, 127u, 128u, 641u, 65535u, 65537u, 1u << 30, (1u << 31) - 1}) {
    const Divisor divisor(d);
    for (uint64_t q : {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{1000}, (uint64_t{1} << 31) / d / 2, ((uint64_t{1} << 31) - 1) / d})
      for (uint64_t n : {q * d, q * d + d - 1, q * d + d / 2})
        if (n < uint64_t{1} << 31) { ASSERT_EQ(divisor.quotient(static_cast<uint32_t>(n)), n / d) << n << " / " << d; }
  }
}

TEST(Routing, ANegativeIdAndADuplicatePairAreErrors) {
  TopkCall call(2, 4, 2);
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, call.run(std::vector<int32_t>{0, 1, -2, 3}));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("topk_ids[1, 0] is -2"));
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, call.run(std::vector<int32_t>{0, 1, 3, 3}));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("topk_ids[1] names expert 3 twice"));
  EXPECT_EQ(MACHMOE_OK, call.run(std::vector<int32_t>{0, 1, 7, 7})) << "dropped slots are no duplicates";
}

TEST(Routing, ListsRejectBadTokensAndDuplicates) {
  Problem p = make_problem({.name = "Lists", .T = 4, .E = 3, .K = 1, .kind = RoutingKind::Lists}, DType::F32);
  const machmoe_layer layer = layer_of(p.shape);
  RoutingBuffer b;
  ASSERT_NO_FATAL_FAILURE(build_routing(p, b));
  const auto run = [&](std::vector<int32_t> tokens, std::vector<int32_t> experts) {
    return machmoe_routing_from_lists(&layer, tokens.data(), experts.data(), MACHMOE_I32, nullptr, nullptr, &b.views, nullptr, 0, nullptr);
  };
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, run({0, 1, 4, 2}, {0, 0, 0, 0}));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("token_ids[2] is 4"));
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, run({0, 1, 1, 2}, {0, 2, 2, 0}));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("(token 1, expert 2) occurs twice"));
  EXPECT_EQ(MACHMOE_OK, run({0, 1, 9, 2}, {0, 2, 3, 0})) << "the token of a dropped pair is not read";
}

TEST(Routing, ReadyMadeListsNameTokensOfTheLayer) {
  Problem p = make_problem({.name = "Lists", .T = 4, .E = 3, .K = 1, .kind = RoutingKind::Lists}, DType::F32);
  RoutingBuffer b;
  ASSERT_NO_FATAL_FAILURE(build_routing(p, b));
  const machmoe_layer layer = layer_of(p.shape);
  EXPECT_EQ(MACHMOE_OK, machmoe_routing_complete(&layer, &b.views, nullptr, 0, nullptr)) << machmoe_last_error();
  for (int32_t token : {-1, 4}) {
    b.views.token[0] = token;
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_routing_complete(&layer, &b.views, nullptr, 0, nullptr));
    EXPECT_THAT(machmoe_last_error(), HasSubstr(fmt::format("token[0] is {}, expected a token in 0 .. 3", token)));
  }
}

TEST(Routing, CountsMayNotExceedTheRows) {
  Problem p = make_problem({.name = "Rows", .T = 4, .E = 2, .K = 1, .kind = RoutingKind::Rows}, DType::F32);
  RoutingBuffer b;
  ASSERT_NO_FATAL_FAILURE(build_routing(p, b));
  const machmoe_layer layer = layer_of(p.shape);
  b.views.counts[0] = 5;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_routing_complete(&layer, &b.views, nullptr, 0, nullptr));
  EXPECT_THAT(machmoe_last_error(), HasSubstr("expected at most the 4 rows"));
}

}  // namespace
}  // namespace machmoe::test
