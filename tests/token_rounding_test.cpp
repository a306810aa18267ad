// Token rounding against a direct transcription of its definition by sorting, over random and adversarial scores.
#include <gmock/gmock.h>

#include "core/token_rounding.h"
#include "layer.h"

namespace machmoe::test {
namespace {

struct Setting {
  std::string name;
  int64_t T, E, K, tile;
  bool renormalize = false;
};
const Setting kSettings[] = {{"Plain", 300, 6, 2, 32},
                             {"Renormalised", 300, 6, 2, 32, true},
                             {"Tile1", 50, 6, 2, 1},
                             {"FewTokens", 20, 6, 2, 32},
                             {"MoreExpertsThanTokens", 40, 64, 3, 8},
                             {"K1", 129, 4, 1, 16},
                             {"TileIsT", 64, 5, 2, 64},
                             {"OneExpert", 70, 1, 1, 32}};
enum class Scores { Softmax, Ties, OneHot, Zero };

std::vector<float> make_scores(const Setting& c, Scores kind, uint64_t seed = 1) {
  Random random(seed);
  std::vector<float> s(static_cast<size_t>(c.T * c.E));
  for (int64_t t = 0; t < c.T; t++) {
    float* row = &s[static_cast<size_t>(t * c.E)];
    double sum = 0;
    for (int64_t e = 0; e < c.E; e++) sum += row[e] = static_cast<float>(std::exp(2 * random.normal()));
    for (int64_t e = 0; e < c.E; e++) {
      if (kind == Scores::Softmax) row[e] /= static_cast<float>(sum);
      if (kind == Scores::Ties) row[e] = static_cast<float>(random.below(3)) / 4;
      if (kind == Scores::OneHot) row[e] = e == t % c.E;
      if (kind == Scores::Zero) row[e] = 0;
    }
  }
  return s;
}

struct Rounded {
  machmoe_layer layer{};
  Buffer metadata{0};
  machmoe_routing routing{.struct_size = sizeof routing};
  std::vector<int32_t> token, expert, counts, token_offsets, inverse;
  std::vector<float> score;
  int64_t R = 0;
};
void round(const Setting& c, const std::vector<float>& scores, RoundingRule rule, uint64_t seed, Rounded& out) {
  int64_t capacity = 0;
  MACHMOE_OK_OR_FAIL(machmoe_rounded_capacity(c.T, c.E, c.K, c.tile, static_cast<int32_t>(rule), &capacity));
  out.layer = layer_of({.T = c.T, .E = c.E, .R_cap = capacity, .kind = RoutingKind::Lists, .dtype = DType::F32});
  size_t bytes = 0, scratch_bytes = 0;
  MACHMOE_OK_OR_FAIL(machmoe_routing_bytes(&out.layer, 1, &bytes, &scratch_bytes));
  MACHMOE_OK_OR_FAIL(machmoe_token_round_workspace_bytes(&out.layer, &scratch_bytes));
  out.metadata = Buffer(bytes);
  Buffer scratch(scratch_bytes);
  machmoe_routing& r = out.routing;
  MACHMOE_OK_OR_FAIL(machmoe_routing_carve(&out.layer, 1, out.metadata.data(), &r));
  const machmoe_token_round_options options{sizeof options, c.K, c.tile, static_cast<int32_t>(rule), c.renormalize, seed};
  MACHMOE_OK_OR_FAIL(machmoe_token_round(&out.layer, &options, scores.data(), &r, scratch.data(), scratch.size(), nullptr));
  out.R = r.offsets[c.E];
  const auto copy = [](const auto* from, int64_t count) { return std::vector(from, from + count); };
  out.token = copy(r.token, out.R);
  out.expert = copy(r.expert, out.R);
  out.score = copy(static_cast<const float*>(r.score), out.R);
  out.counts = copy(r.counts, c.E);
  out.token_offsets = copy(r.token_offsets, c.T + 1);
  out.inverse = copy(r.inverse, out.R);
  ASSERT_LE(out.R, capacity);
}

// The definition: sort every expert's column, top-K pairs first, and take the first `target` of it.
struct Definition {
  std::vector<int32_t> f, target;
  std::vector<std::vector<int32_t>> ranked;  // per expert, all tokens in rank order
};
Definition define(const Setting& c, const std::vector<float>& scores, RoundingRule rule, uint64_t seed) {
  Definition d;
  const auto score = [&](int64_t t, int64_t e) { return scores[static_cast<size_t>(t * c.E + e)]; };
  std::vector<std::vector<bool>> chosen(static_cast<size_t>(c.E), std::vector<bool>(static_cast<size_t>(c.T)));
  for (int64_t t = 0; t < c.T; t++) {
    std::vector<int32_t> order(static_cast<size_t>(c.E));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score(t, a) > score(t, b); });
    for (int64_t k = 0; k < c.K; k++) chosen[static_cast<size_t>(order[static_cast<size_t>(k)])][static_cast<size_t>(t)] = true;
  }
  int64_t z = 0;
  for (int64_t e = 0; e < c.E; e++) {
    const auto& mine = chosen[static_cast<size_t>(e)];
    std::vector<int32_t> order(static_cast<size_t>(c.T));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const bool ca = mine[static_cast<size_t>(a)], cb = mine[static_cast<size_t>(b)];
      return ca != cb ? ca : score(a, e) > score(b, e);
    });
    const auto f = static_cast<int32_t>(std::count(mine.begin(), mine.end(), true)), tile = static_cast<int32_t>(c.tile);
    const int32_t down = f / tile * tile, up = down == f ? f : down + tile;
    const float u = philox_uniform(seed, static_cast<uint32_t>(e));
    bool raise = false;
    switch (rule) {
      case RoundingRule::NrF: raise = up - f < f - down; break;
      case RoundingRule::SrF: raise = u < static_cast<float>(f - down) / static_cast<float>(tile); break;
      case RoundingRule::NrS: {
        float below = 0, span = 0;
        for (int32_t i = down; i < std::min<int64_t>(up, c.T); i++) {
          span += score(order[static_cast<size_t>(i)], e);
          if (i < f) below = span;
        }
        raise = u * span < below;
        break;
      }
      case RoundingRule::Up: raise = true; break;
      case RoundingRule::Down: break;
      case RoundingRule::BalanceF: raise = std::abs(up - f + z) < std::abs(down - f + z); break;
    }
    int32_t target = raise && up <= c.T ? up : down;
    if (c.T < c.tile) target = f;
    z += target - f;
    d.f.push_back(f);
    d.target.push_back(target);
    d.ranked.push_back(order);
  }
  return d;
}

const std::pair<const char*, RoundingRule> kRules[] = {{"NrF", RoundingRule::NrF},   {"SrF", RoundingRule::SrF},
                                                       {"NrS", RoundingRule::NrS},   {"Up", RoundingRule::Up},
                                                       {"Down", RoundingRule::Down}, {"BalanceF", RoundingRule::BalanceF}};
const std::pair<const char*, Scores> kScores[] = {
    {"Softmax", Scores::Softmax}, {"Ties", Scores::Ties}, {"OneHot", Scores::OneHot}, {"Zero", Scores::Zero}};

class TokenRoundingTest : public testing::TestWithParam<std::tuple<Setting, std::pair<const char*, RoundingRule>, std::pair<const char*, Scores>>> {};

TEST_P(TokenRoundingTest, IsItsDefinition) {
  const auto& [c, rule, kind] = GetParam();
  const auto scores = make_scores(c, kind.second);
  const uint64_t seed = 11;
  Rounded r;
  ASSERT_NO_FATAL_FAILURE(round(c, scores, rule.second, seed, r));
  const Definition d = define(c, scores, rule.second, seed);
  ASSERT_EQ(r.counts, d.target);
  int64_t row = 0, moved = 0;
  for (int64_t e = 0; e < c.E; e++) {
    const auto at = static_cast<size_t>(e);
    EXPECT_LE(std::abs(d.target[at] - d.f[at]), c.tile) << "no expert moves by more than a tile";
    EXPECT_EQ(c.T >= c.tile ? d.target[at] % c.tile : d.target[at] - d.f[at], 0) << "multiples of the tile; fewer tokens than a tile: plain top-K";
    moved += d.target[at] - d.f[at];
    std::vector<int32_t> tokens(d.ranked[at].begin(), d.ranked[at].begin() + d.target[at]);
    std::sort(tokens.begin(), tokens.end());
    for (int32_t t : tokens) {
      ASSERT_EQ(r.token[static_cast<size_t>(row)], t);
      ASSERT_EQ(r.expert[static_cast<size_t>(row)], e);
      row++;
    }
  }
  const bool capped = std::any_of(d.f.begin(), d.f.end(), [&](int32_t f) { return f / c.tile * c.tile + c.tile > c.T; });
  EXPECT_TRUE(rule.second != RoundingRule::BalanceF || capped || 2 * std::abs(moved) <= c.tile) << "the total stays within half a tile";

  for (int64_t t = 0; t < c.T; t++) {
    const auto slots = std::pair{r.token_offsets[static_cast<size_t>(t)], r.token_offsets[static_cast<size_t>(t) + 1]};
    double sum = 0, kept = 0;
    for (int32_t i = slots.first; i < slots.second; i++) {
      const auto at = static_cast<size_t>(r.inverse[static_cast<size_t>(i)]);
      ASSERT_EQ(r.token[at], t);
      const float raw = scores[static_cast<size_t>(t * c.E + r.expert[at])];
      ASSERT_TRUE(c.renormalize || r.score[at] == raw);
      kept += r.score[at];
      sum += raw;
    }
    ASSERT_NEAR(kept, c.renormalize && sum > 0 ? 1 : sum, 1e-5);
  }
}

// ds/dp of the kept pairs of a token is the identity; renormalised, with s_i = p_i / sum p, it is (i == j) / sum p - p_i / (sum p)^2.
TEST_P(TokenRoundingTest, ItsGradientIsTheTransposedJacobian) {
  const auto& [c, rule, kind] = GetParam();
  const auto scores = make_scores(c, kind.second);
  Rounded r;
  ASSERT_NO_FATAL_FAILURE(round(c, scores, rule.second, 11, r));
  Random random(2);
  std::vector<float> ds(static_cast<size_t>(r.layer.row_capacity), NAN), dp(scores.size(), NAN);
  for (int64_t row = 0; row < r.R; row++) ds[static_cast<size_t>(row)] = static_cast<float>(random.normal());
  MACHMOE_OK_OR_FAIL(machmoe_token_round_backward(&r.layer, c.renormalize, scores.data(), &r.routing, ds.data(), dp.data(), nullptr));

  std::vector<std::vector<size_t>> rows(static_cast<size_t>(c.T));  // of each token
  for (int64_t row = 0; row < r.R; row++) rows[static_cast<size_t>(r.token[static_cast<size_t>(row)])].push_back(static_cast<size_t>(row));
  std::vector<double> expected(dp.size(), 0), tolerance(dp.size(), 0);
  for (size_t t = 0; t < rows.size(); t++) {
    const auto pair = [&](size_t row) { return t * static_cast<size_t>(c.E) + static_cast<size_t>(r.expert[row]); };
    double sum = 0, size = 0;
    for (size_t row : rows[t]) {
      sum += scores[pair(row)];
      size += std::abs(ds[row]);
    }
    const bool scaled = c.renormalize && sum > 0;
    for (size_t j : rows[t]) {
      for (size_t i : rows[t]) expected[pair(j)] += ds[i] * (scaled ? (i == j) / sum - scores[pair(i)] / (sum * sum) : i == j);
      if (scaled) tolerance[pair(j)] = 1e-6 * size / sum;
    }
  }
  for (size_t i = 0; i < dp.size(); i++) ASSERT_LE(std::abs(dp[i] - expected[i]), tolerance[i]) << "token, expert " << i / c.E << ", " << i % c.E;
}

std::string setting_name(const testing::TestParamInfo<TokenRoundingTest::ParamType>& test) {
  return std::get<0>(test.param).name + "_" + std::get<1>(test.param).first + "_" + std::get<2>(test.param).first;
}
INSTANTIATE_TEST_SUITE_P(Rules, TokenRoundingTest,
                         testing::Combine(testing::ValuesIn(kSettings), testing::ValuesIn(kRules), testing::ValuesIn(kScores)), setting_name);

TEST(TokenRounding, EqualSeedsGiveEqualResultsAndSeedsMatter) {
  const Setting c{"Seeds", 500, 32, 4, 32};
  const auto scores = make_scores(c, Scores::Softmax);
  for (RoundingRule rule : {RoundingRule::SrF, RoundingRule::NrS}) {
    Rounded a, b, other;
    ASSERT_NO_FATAL_FAILURE(round(c, scores, rule, 1, a));
    ASSERT_NO_FATAL_FAILURE(round(c, scores, rule, 1, b));
    ASSERT_NO_FATAL_FAILURE(round(c, scores, rule, 2, other));
    EXPECT_TRUE(a.token == b.token && a.counts == b.counts);
    EXPECT_NE(a.counts, other.counts);
  }
}

TEST(TokenRounding, StochasticRoundingKeepsTheExpectedCount) {
  const Setting c{"Mean", 100, 16, 4, 16};
  const auto scores = make_scores(c, Scores::Softmax);
  double rows = 0;
  const int draws = 200;
  for (uint64_t seed = 0; seed < draws; seed++) {
    Rounded r;
    ASSERT_NO_FATAL_FAILURE(round(c, scores, RoundingRule::SrF, seed, r));
    rows += static_cast<double>(r.R) / draws;
  }
  EXPECT_NEAR(rows, 400, 8);  // the standard error of the mean is at most 8 sqrt(16 / 200) = 2.3
}

TEST(TokenRounding, TheGradientNeedsTheRoutingAndScoresToRenormalise) {
  const Setting c{"Arguments", 40, 4, 2, 16};
  const auto scores = make_scores(c, Scores::Softmax);
  Rounded r;
  ASSERT_NO_FATAL_FAILURE(round(c, scores, RoundingRule::NrF, 1, r));
  std::vector<float> ds(static_cast<size_t>(r.layer.row_capacity)), dp(scores.size());
  const auto run = [&](bool renormalize, const float* dscore) {
    return machmoe_token_round_backward(&r.layer, renormalize, nullptr, &r.routing, dscore, dp.data(), nullptr);
  };
  EXPECT_EQ(MACHMOE_OK, run(false, ds.data())) << machmoe_last_error();
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, run(true, ds.data()));
  EXPECT_THAT(machmoe_last_error(), testing::HasSubstr("scores is null"));
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, run(false, nullptr));
  EXPECT_THAT(machmoe_last_error(), testing::HasSubstr("dscore is null"));
  r.routing.expert = nullptr;
  EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, run(false, ds.data()));
  EXPECT_THAT(machmoe_last_error(), testing::HasSubstr("routing.expert is null"));
}

TEST(TokenRounding, ScoresOutsideTheUnitIntervalAreErrors) {
  const Setting c{"Bad", 40, 4, 2, 16};
  for (float bad : {1.5f, -0.1f, NAN}) {
    auto scores = make_scores(c, Scores::Softmax);
    scores[7] = bad;
    const machmoe_layer layer = layer_of({.T = c.T, .E = c.E, .R_cap = 80, .kind = RoutingKind::Lists, .dtype = DType::F32});
    size_t bytes = 0, scratch = 0;
    ASSERT_EQ(MACHMOE_OK, machmoe_routing_bytes(&layer, 1, &bytes, &scratch));
    Buffer metadata(bytes);
    machmoe_routing r{.struct_size = sizeof r};
    ASSERT_EQ(MACHMOE_OK, machmoe_routing_carve(&layer, 1, metadata.data(), &r));
    const machmoe_token_round_options options{sizeof options, c.K, c.tile, MACHMOE_DOWN, 0, 0};
    EXPECT_EQ(MACHMOE_INVALID_ARGUMENT, machmoe_token_round(&layer, &options, scores.data(), &r, nullptr, 0, nullptr));
    EXPECT_THAT(machmoe_last_error(), testing::HasSubstr("scores[1, 3]"));
  }
}

}  // namespace
}  // namespace machmoe::test
