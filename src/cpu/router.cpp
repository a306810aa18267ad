// Top-K router, forward and backward. The renormalised softmax of the selected experts equals the softmax over their logits,
// so two of the three kinds share one formula.
#include "cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace machmoe::cpu {
namespace {

constexpr int64_t kTokenBlock = 256;  // sums over tokens are made of these blocks, in order
int64_t blocks_of(int64_t T) { return (T + kTokenBlock - 1) / kTokenBlock; }

// Calls f(t) for the tokens of one block.
template <class F>
void for_tokens(int64_t block, int64_t T, F&& f) {
  for (int64_t t = block * kTokenBlock; t < std::min(T, (block + 1) * kTokenBlock); t++) f(t);
}

template <class Accum, class Logit>
void read_row(const Logit* logits, int64_t E, Accum* out) {
  for (int64_t e = 0; e < E; e++) out[e] = static_cast<Accum>(logits[e]);
}

template <class Accum>
void softmax(const Accum* x, int64_t count, Accum* out) {
  const Accum top = *std::max_element(x, x + count);
  Accum sum = 0;
  for (int64_t i = 0; i < count; i++) sum += out[i] = std::exp(x[i] - top);
  for (int64_t i = 0; i < count; i++) out[i] /= sum;
}

// NaN ranks highest, as in torch.topk: the weights then are NaN, and nothing hides it.
template <class Accum>
Accum rank_value(Accum x) {
  return std::isnan(x) ? std::numeric_limits<Accum>::infinity() : x;
}

template <class Logit>
void topk_of(const TopkArgs& p) {
  using Accum = AccumOf<Logit>;
  const auto* logits = static_cast<const Logit*>(p.logits);
  auto* weights = static_cast<Accum*>(p.weights);
  const int64_t T = p.T, E = p.E, K = p.K, blocks = blocks_of(T);
  std::vector<int32_t> counts(static_cast<size_t>(blocks * E), 0);
  std::vector<Accum> probability_sums(static_cast<size_t>(p.aux ? blocks * E : 0), 0);

  parallel_for(blocks, [&](int64_t block) {
    std::vector<Accum> x(static_cast<size_t>(E)), prob(static_cast<size_t>(E)), chosen(static_cast<size_t>(K));
    std::vector<int32_t> rank(static_cast<size_t>(E));
    for_tokens(block, T, [&](int64_t t) {
      read_row(logits + t * E, E, x.data());
      std::iota(rank.begin(), rank.end(), 0);
      std::partial_sort(rank.begin(), rank.begin() + K, rank.end(), [&](int32_t a, int32_t b) {
        const Accum xa = rank_value(x[a]), xb = rank_value(x[b]);
        return xa > xb || (xa == xb && a < b);
      });
      if (p.aux || p.kind == RouterKind::SoftmaxTopk) softmax(x.data(), E, prob.data());
      for (int64_t k = 0; k < K; k++) {
        const int32_t e = rank[k];
        p.ids[t * K + k] = e;
        counts[block * E + e]++;
        chosen[k] = p.kind == RouterKind::SoftmaxTopk ? prob[e] : x[e];
      }
      if (p.kind == RouterKind::SoftmaxTopk) std::copy(chosen.begin(), chosen.end(), weights + t * K);
      else softmax(chosen.data(), K, weights + t * K);
      if (p.aux)
        for (int64_t e = 0; e < E; e++) probability_sums[block * E + e] += prob[e];
    });
  });

  std::fill(p.counts, p.counts + E, 0);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t e = 0; e < E; e++) p.counts[e] += counts[block * E + e];
  if (!p.aux) return;
  Accum loss = 0;
  for (int64_t e = 0; e < E && T > 0; e++) {
    Accum sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += probability_sums[block * E + e];
    loss += Accum(E) * (Accum(p.counts[e]) / Accum(T * K)) * (sum / Accum(T));
  }
  *static_cast<Accum*>(p.aux) = loss;
}

// dS of a slot, summed over the column tiles in order; 0 for a dropped slot.
template <class Accum>
Accum score_gradient(const TopkBackwardArgs& p, int64_t slot) {
  if (p.dweights) return static_cast<const Accum*>(p.dweights)[slot];
  const int64_t row = p.inverse[slot];
  Accum sum = 0;
  for (int64_t part = 0; row >= 0 && part < p.parts; part++) sum += static_cast<const Accum*>(p.ds_parts)[part * p.R_cap + row];
  return sum;
}

template <class Logit>
void topk_backward_of(const TopkBackwardArgs& p) {
  using Accum = AccumOf<Logit>;
  const auto* logits = static_cast<const Logit*>(p.logits);
  const auto* weights = static_cast<const Accum*>(p.weights);
  auto* dlogits = static_cast<Logit*>(p.dlogits);
  const int64_t T = p.T, E = p.E, K = p.K;
  const bool over_all = p.kind == RouterKind::SoftmaxTopk;
  const Accum aux_scale = p.daux ? *static_cast<const Accum*>(p.daux) * Accum(E) / (Accum(T * K) * Accum(T)) : Accum(0);

  parallel_for(blocks_of(T), [&](int64_t block) {
    std::vector<Accum> x(static_cast<size_t>(E)), prob(static_cast<size_t>(E)), d(static_cast<size_t>(E));
    for_tokens(block, T, [&](int64_t t) {
      const int32_t* ids = p.ids + t * K;
      const Accum* w = weights + t * K;
      std::fill(d.begin(), d.end(), Accum(0));
      Accum mean = 0;  // sum of w dw over the selected: the softmax's own term
      for (int64_t k = 0; k < K; k++) {
        d[ids[k]] = score_gradient<Accum>(p, t * K + k);
        mean += w[k] * d[ids[k]];
      }
      if (over_all || p.daux) {
        read_row(logits + t * E, E, x.data());
        softmax(x.data(), E, prob.data());
      }
      if (over_all) {
        for (int64_t e = 0; e < E; e++) d[e] = prob[e] * (d[e] - mean);
      } else {
        for (int64_t k = 0; k < K; k++) d[ids[k]] = w[k] * (d[ids[k]] - mean);
      }
      if (p.daux) {
        Accum load = 0;
        for (int64_t e = 0; e < E; e++) load += Accum(p.counts[e]) * prob[e];
        for (int64_t e = 0; e < E; e++) d[e] += aux_scale * prob[e] * (Accum(p.counts[e]) - load);
      }
      for (int64_t e = 0; e < E; e++) dlogits[t * E + e] = static_cast<Logit>(d[e]);
    });
  });
}

}  // namespace

void topk(const TopkArgs& p, Stream) {
  dispatch_float(p.logits_dtype, [&](auto tag) { topk_of<typename decltype(tag)::type>(p); });
}

void topk_backward(const TopkBackwardArgs& p, Stream) {
  dispatch_float(p.logits_dtype, [&](auto tag) { topk_backward_of<typename decltype(tag)::type>(p); });
}

}  // namespace machmoe::cpu
