// Token rounding (arXiv 2512.14080, §5, Algorithm 4), per expert and without a sort of T x E scores:
// top-K membership -> counts -> target of each expert -> the best pairs of each expert -> a Lists routing.
#include "cpu/token_rounding.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "core/check.h"
#include "cpu/parallel.h"

namespace machmoe::cpu {
namespace {

// Orders candidates of one expert or one token: higher score first, then the lower index. Scores are in [0, 1], so their bits are monotone.
uint64_t rank_key(float score, uint32_t index) {
  return uint64_t(std::bit_cast<uint32_t>(score + 0.f)) << 32 | (0xFFFFFFFFu - index);  // + 0.f: -0 ranks as 0
}
uint32_t index_of(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

// chosen[e T + t] = 1 where e is among the top K of token t.
void mark_topk(const TokenRoundArgs& p, std::vector<uint8_t>& chosen) {
  const int64_t T = p.shape.T, E = p.shape.E;
  parallel_for(T, [&](int64_t t) {
    static thread_local std::vector<uint64_t> keys;
    keys.resize(static_cast<size_t>(E));
    for (int64_t e = 0; e < E; e++) {
      const float s = p.scores[t * E + e];
      MACHMOE_CHECK(s >= 0.f && s <= 1.f, "scores[{}, {}] is {}, expected a value in [0, 1]: pass softmax or sigmoid scores", t, e, s);
      keys[e] = rank_key(s, static_cast<uint32_t>(e));
    }
    std::nth_element(keys.begin(), keys.begin() + (p.K - 1), keys.end(), std::greater<>());
    for (int64_t k = 0; k < p.K; k++) chosen[index_of(keys[k]) * T + t] = 1;
  });
}

// The candidates of an expert in two groups, both unordered: its f top-K tokens first, then all others.
struct Ranking {
  std::vector<uint64_t> keys;  // [T]
  int64_t f = 0;
};
Ranking rank_tokens(const TokenRoundArgs& p, int64_t e, const uint8_t* chosen) {
  const int64_t T = p.shape.T, E = p.shape.E;
  Ranking r{std::vector<uint64_t>(static_cast<size_t>(T)), 0};
  int64_t last = T;
  for (int64_t t = 0; t < T; t++) {
    const uint64_t key = rank_key(p.scores[t * E + e], static_cast<uint32_t>(t));
    if (chosen[t]) r.keys[r.f++] = key;
    else r.keys[--last] = key;
  }
  return r;
}
// Moves the `keep` best candidates to the front; top-K tokens outrank all others.
void select_best(Ranking& r, int64_t keep) {
  const auto begin = r.keys.begin();
  if (keep < r.f) std::nth_element(begin, begin + keep, begin + r.f, std::greater<>());
  else if (keep > r.f && keep < int64_t(r.keys.size())) std::nth_element(begin + r.f, begin + keep, r.keys.end(), std::greater<>());
}
// NrS: sums of the scores of ranks down .. f - 1 and down .. up - 1, added in rank order.
void score_sums(const Ranking& r, int64_t down, int64_t up, float& below, float& span) {
  std::vector<uint64_t> keys = r.keys;
  Ranking sorted{std::move(keys), r.f};
  select_best(sorted, down);
  std::sort(sorted.keys.begin() + down, sorted.keys.begin() + r.f, std::greater<>());
  select_best(sorted, up);
  std::sort(sorted.keys.begin() + r.f, sorted.keys.begin() + up, std::greater<>());
  below = 0.f;
  span = 0.f;
  for (int64_t i = down; i < up; i++) {
    span += std::bit_cast<float>(static_cast<uint32_t>(sorted.keys[i] >> 32));
    if (i == r.f - 1) below = span;
  }
}

}  // namespace

size_t token_round_scratch(const Shape&) { return 0; }

void token_round(const TokenRoundArgs& p, Stream) {
  const int64_t T = p.shape.T, E = p.shape.E;
  const bool rounding = T >= p.tile;  // fewer tokens than one tile: plain top-K
  const int32_t tile = static_cast<int32_t>(p.tile);
  std::vector<uint8_t> chosen(static_cast<size_t>(T * E), 0);
  mark_topk(p, chosen);

  std::vector<int32_t> topk_count(static_cast<size_t>(E)), target(static_cast<size_t>(E));
  std::vector<Ranking> ranking(static_cast<size_t>(E));
  parallel_for(E, [&](int64_t e) {
    Ranking& r = ranking[e] = rank_tokens(p, e, chosen.data() + e * T);
    const int64_t over = r.f % p.tile, down = r.f - over, up = down + p.tile;
    topk_count[e] = target[e] = static_cast<int32_t>(r.f);
    if (!rounding || over == 0) return;
    float below = 0.f, span = 0.f;
    if (p.rule == RoundingRule::NrS && up <= T) score_sums(r, down, up, below, span);
    const bool pad = up <= T && rounds_up(p.rule, topk_count[e], tile, p.seed, static_cast<uint32_t>(e), below, span);
    target[e] = static_cast<int32_t>(pad ? up : down);
  });
  if (rounding && p.rule == RoundingRule::BalanceF) {
    int64_t z = 0;
    for (int64_t e = 0; e < E; e++) {
      const int32_t f = topk_count[e], down = f - f % tile;
      target[e] = down + tile <= T && balance_rounds_up(f, tile, z) ? down + tile : down;
      z += target[e] - f;
    }
  }

  // Rows: grouped by expert, ascending token inside one.
  const Routing& out = p.out;
  std::copy(target.begin(), target.end(), out.counts);
  out.offsets[0] = 0;
  std::partial_sum(target.begin(), target.end(), out.offsets + 1);
  const int64_t R = out.offsets[E];
  auto* score = static_cast<float*>(out.score);
  parallel_for(E, [&](int64_t e) {
    Ranking& r = ranking[e];
    select_best(r, target[e]);
    int32_t* token = out.token + out.offsets[e];
    for (int32_t i = 0; i < target[e]; i++) token[i] = static_cast<int32_t>(index_of(r.keys[i]));
    std::sort(token, token + target[e]);
    for (int64_t row = out.offsets[e]; row < out.offsets[e + 1]; row++) {
      out.expert[row] = static_cast<int32_t>(e);
      score[row] = p.scores[int64_t(out.token[row]) * E + e];
    }
  });
  std::fill(out.token + R, out.token + p.shape.R_cap, 0);
  std::fill(out.expert + R, out.expert + p.shape.R_cap, 0);
  std::fill(score + R, score + p.shape.R_cap, 0.f);

  // Slots of a token: its rows in ascending order.
  std::fill(out.token_offsets, out.token_offsets + T + 1, 0);
  for (int64_t row = 0; row < R; row++) out.token_offsets[out.token[row] + 1]++;
  std::partial_sum(out.token_offsets, out.token_offsets + T + 1, out.token_offsets);
  std::vector<int32_t> next(out.token_offsets, out.token_offsets + T);
  for (int64_t row = 0; row < R; row++) out.inverse[next[out.token[row]]++] = static_cast<int32_t>(row);
  std::fill(out.inverse + R, out.inverse + p.shape.R_cap, -1);

  if (p.renormalize) {
    parallel_for(T, [&](int64_t t) {
      float sum = 0.f, part = 0.f;  // of 32 experts at a time: everywhere the same bits
      for (int32_t i = out.token_offsets[t], word = 0; i < out.token_offsets[t + 1]; i++) {
        const int32_t row = out.inverse[i];
        if (out.expert[row] / 32 != word) {
          sum += std::exchange(part, 0.f);
          word = out.expert[row] / 32;
        }
        part += score[row];
      }
      sum += part;
      if (sum > 0.f)
        for (int32_t i = out.token_offsets[t]; i < out.token_offsets[t + 1]; i++) score[out.inverse[i]] /= sum;
    });
  }
}

void token_round_backward(const TokenRoundBackwardArgs& p, Stream) {
  const int64_t E = p.shape.E;
  const Routing& r = p.routing;
  const auto* score = static_cast<const float*>(r.score);
  parallel_for(p.shape.T, [&](int64_t t) {
    const auto each_pair = [&](auto f) {  // f(row, place in [T, E]) in slot order
      for (int32_t i = r.token_offsets[t]; i < r.token_offsets[t + 1]; i++) f(r.inverse[i], t * E + r.expert[r.inverse[i]]);
    };
    float sum = 0.f, mean = 0.f;  // of p; of ds, weighted by s
    if (p.renormalize)
      each_pair([&](int32_t row, int64_t pair) {
        sum += p.scores[pair];
        mean += score[row] * p.dscore[row];
      });
    if (!(sum > 0.f)) sum = 1.f;
    std::fill(p.dscores + t * E, p.dscores + (t + 1) * E, 0.f);
    each_pair([&](int32_t row, int64_t pair) { p.dscores[pair] = (p.dscore[row] - mean) / sum; });
  });
}

}  // namespace machmoe::cpu
