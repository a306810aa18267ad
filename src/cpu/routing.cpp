// Routing metadata: pairs (token, expert) -> rows grouped by expert, ascending token inside one.
#include "cpu/routing.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include "core/check.h"

namespace machmoe::cpu {
namespace {

struct Ids {
  const void* data;
  DType dtype;
  int64_t operator[](int64_t i) const { return dtype == DType::I64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i]; }
};

// offsets = exclusive sum of counts.
void sum_counts(const Shape& s, const Routing& r) {
  r.offsets[0] = 0;
  std::partial_sum(r.counts, r.counts + s.E, r.offsets + 1);
}

void clear_rows_past(int64_t R, const Shape& s, const Routing& r, int32_t* order) {
  int32_t* const index = s.kind == RoutingKind::TopK ? r.slot : r.token;
  std::fill(index + R, index + s.R_cap, 0);
  if (r.expert) std::fill(r.expert + R, r.expert + s.R_cap, 0);
  if (order) std::fill(order + R, order + s.R_cap, -1);
}

// Lists: the slots of a token are its rows in ascending order.
void index_tokens(const Shape& s, const Routing& r) {
  const int64_t R = r.offsets[s.E];
  std::fill(r.token_offsets, r.token_offsets + s.T + 1, 0);
  for (int64_t row = 0; row < R; row++) r.token_offsets[r.token[row] + 1]++;
  std::partial_sum(r.token_offsets, r.token_offsets + s.T + 1, r.token_offsets);
  std::vector<int32_t> next(r.token_offsets, r.token_offsets + s.T);
  for (int64_t row = 0; row < R; row++) r.inverse[next[r.token[row]]++] = static_cast<int32_t>(row);
  std::fill(r.inverse + R, r.inverse + s.R_cap, -1);
}

// The scores that the caller gave, in row order; rows past R get 0.
template <class Accum>
void permute_scores(const Shape& s, const void* scores, std::span<const int32_t> order, void* score) {
  auto* const out = static_cast<Accum*>(score);
  for (size_t row = 0; row < order.size(); row++) out[row] = static_cast<const Accum*>(scores)[order[row]];
  std::fill(out + order.size(), out + s.R_cap, Accum(0));
}

}  // namespace

void index_topk(const IndexTopkArgs& p, Stream) {
  const Shape& s = p.shape;
  const Ids ids{p.ids, p.ids_dtype};
  std::fill(p.out.counts, p.out.counts + s.E, 0);
  for (int64_t slot = 0; slot < s.R_cap; slot++) {
    const int64_t t = slot / s.K, expert = ids[slot];
    MACHMOE_CHECK(expert >= 0, "topk_ids[{}, {}] is {}, expected an expert id >= 0: use an id >= E = {} to drop a slot", t, slot % s.K, expert, s.E);
    if (expert >= s.E) continue;
    for (int64_t earlier = t * s.K; earlier < slot; earlier++)
      MACHMOE_CHECK(ids[earlier] != expert, "topk_ids[{}] names expert {} twice, expected different experts for one token", t, expert);
    p.out.counts[expert]++;
  }
  sum_counts(s, p.out);

  const int64_t R = p.out.offsets[s.E];
  std::vector<int32_t> next(p.out.offsets, p.out.offsets + s.E);
  for (int64_t slot = 0; slot < s.R_cap; slot++) {
    const int64_t expert = ids[slot];
    if (expert >= s.E) {
      p.out.inverse[slot] = -1;
      continue;
    }
    const int32_t row = next[expert]++;
    p.out.inverse[slot] = row;
    p.out.slot[row] = static_cast<int32_t>(slot);
    if (p.out.expert) p.out.expert[row] = static_cast<int32_t>(expert);
  }
  clear_rows_past(R, s, p.out, nullptr);
}

void index_lists(const IndexListsArgs& p, Stream) {
  const Shape& s = p.shape;
  const Ids tokens{p.token_ids, p.ids_dtype}, experts{p.expert_ids, p.ids_dtype};
  std::fill(p.out.counts, p.out.counts + s.E, 0);
  for (int64_t i = 0; i < s.R_cap; i++) {
    const int64_t expert = experts[i], token = tokens[i];
    MACHMOE_CHECK(expert >= 0, "expert_ids[{}] is {}, expected an expert id >= 0: use an id >= E = {} to drop a pair", i, expert, s.E);
    if (expert >= s.E) continue;
    MACHMOE_CHECK(token >= 0 && token < s.T, "token_ids[{}] is {}, expected a token in 0 .. {}", i, token, s.T - 1);
    p.out.counts[expert]++;
  }
  sum_counts(s, p.out);

  const int64_t R = p.out.offsets[s.E];
  std::vector<int32_t> next(p.out.offsets, p.out.offsets + s.E), order(static_cast<size_t>(R));
  for (int64_t i = 0; i < s.R_cap; i++)
    if (const int64_t expert = experts[i]; expert < s.E) order[next[expert]++] = static_cast<int32_t>(i);
  for (int64_t e = 0; e < s.E; e++) {
    const auto begin = order.begin() + p.out.offsets[e], end = order.begin() + p.out.offsets[e + 1];
    std::sort(begin, end, [&](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
    for (auto it = begin; it != end; ++it) {
      MACHMOE_CHECK(it == begin || tokens[*it] != tokens[it[-1]],
                    "the pair (token {}, expert {}) occurs twice, expected different pairs: add their scores", tokens[*it], e);
      const int64_t row = it - order.begin();
      p.out.token[row] = static_cast<int32_t>(tokens[*it]);
      if (p.out.expert) p.out.expert[row] = static_cast<int32_t>(e);
    }
  }
  if (p.scores && s.accum() == DType::F64) permute_scores<double>(s, p.scores, order, p.out.score);
  else if (p.scores) permute_scores<float>(s, p.scores, order, p.out.score);
  if (p.order) std::copy(order.begin(), order.end(), p.order);
  clear_rows_past(R, s, p.out, p.order);
  index_tokens(s, p.out);
}

void index_rows(const IndexRowsArgs& p, Stream) {
  const Shape& s = p.shape;
  int64_t R = 0;
  for (int64_t e = 0; e < s.E; e++) {
    MACHMOE_CHECK(p.out.counts[e] >= 0, "counts[{}] is {}, expected a number of rows >= 0", e, p.out.counts[e]);
    R += p.out.counts[e];
  }
  MACHMOE_CHECK(R <= s.R_cap, "counts sum to {}, expected at most the {} rows that are there", R, s.R_cap);
  sum_counts(s, p.out);
  if (s.kind != RoutingKind::Lists) return;
  for (int64_t e = 0; e < s.E; e++) {
    for (int64_t row = p.out.offsets[e]; row < p.out.offsets[e + 1]; row++) {
      const int32_t token = p.out.token[row];
      MACHMOE_CHECK(token >= 0 && token < s.T, "token[{}] is {}, expected a token in 0 .. {}", row, token, s.T - 1);
      MACHMOE_CHECK(row == p.out.offsets[e] || p.out.token[row - 1] < token, "token[{}] is {} after {} in expert {}, expected ascending tokens", row,
                    token, p.out.token[row - 1], e);
    }
  }
  index_tokens(s, p.out);
}

}  // namespace machmoe::cpu
