// The case table: shapes x routing patterns x layouts x activations x biases, with fresh random data of unit variance.
// Every test and driver of a whole layer runs over it.
#pragma once
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/types.h"

namespace machmoe::test {

enum class Pattern {
  Random,       // K different experts for each token
  OneExpert,    // K = 1, every token to expert 1
  EvenExperts,  // experts 1, 3, ... stay empty
  TileEdges,    // K = 1; experts get 1, 127, 128, 129, 0, ... rows
  Dropped,      // about a third of the ids is >= E, some tokens keep none
  AllDropped,   // R = 0
};
enum class Layout { Concatenated, Interleaved, TwoTensors };

struct Case {
  std::string name;
  int64_t T = 100, d = 72, n = 104, E = 5, K = 2;
  Pattern pattern = Pattern::Random;
  RoutingKind kind = RoutingKind::TopK;
  Activation act;
  Layout layout = Layout::Concatenated;
  bool bias = false;
};

inline std::vector<Case> case_table() {
  std::vector<Case> cases = {
      {.name = "Random"},
      {.name = "K1", .K = 1},
      {.name = "KequalsE", .K = 5},
      {.name = "OddT", .T = 37, .K = 3},
      {.name = "NoTokens", .T = 0},
      {.name = "OneToken", .T = 1},
      {.name = "SingleExpert", .E = 1, .K = 1},
      {.name = "OneExpertTakesAll", .T = 300, .K = 1, .pattern = Pattern::OneExpert},
      {.name = "EmptyExperts", .E = 7, .pattern = Pattern::EvenExperts},
      {.name = "TileEdges", .T = 385, .E = 6, .K = 1, .pattern = Pattern::TileEdges},
      {.name = "Dropped", .T = 150, .K = 3, .pattern = Pattern::Dropped, .bias = true},
      {.name = "AllDropped", .pattern = Pattern::AllDropped, .bias = true},
      {.name = "ManyExperts", .T = 50, .d = 40, .n = 24, .E = 64, .K = 6},
      {.name = "Bias", .bias = true},
      {.name = "ListsRandom", .T = 150, .kind = RoutingKind::Lists, .bias = true},
      {.name = "ListsDropped", .T = 150, .K = 4, .pattern = Pattern::Dropped, .kind = RoutingKind::Lists},
      {.name = "ListsAllDropped", .pattern = Pattern::AllDropped, .kind = RoutingKind::Lists},
      {.name = "Rows", .T = 200, .kind = RoutingKind::Rows, .bias = true},
      {.name = "RowsTileEdges", .T = 385, .E = 6, .K = 1, .pattern = Pattern::TileEdges, .kind = RoutingKind::Rows},
      {.name = "RowsDropped", .T = 100, .pattern = Pattern::Dropped, .kind = RoutingKind::Rows},
  };
  for (const auto& [name, layout] : {std::pair{"Interleaved", Layout::Interleaved}, {"TwoTensors", Layout::TwoTensors}})
    cases.push_back({.name = name, .layout = layout, .bias = true});
  for (int64_t d : {8, 104})
    for (int64_t n : {8, 72}) cases.push_back({.name = fmt::format("d{}n{}", d, n), .d = d, .n = n});
  using A = ActivationKind;
  // The clamps lie midway between two bf16 numbers: the saved H is then on the same side of them as H.
  const std::pair<const char*, Activation> activations[] = {{"SwiGLUClamped", {A::SwiGLU, 1.702f, 0.501953125f}},
                                                            {"SwiGLUOai", {A::SwiGLUOai, 1.702f, 7.f}},
                                                            {"SwiGLUOaiClamped", {A::SwiGLUOai, 1.702f, 0.701171875f}},
                                                            {"GeGLU", {A::GeGLU}},
                                                            {"ReGLU", {A::ReGLU}},
                                                            {"ReLU2", {A::ReLU2}},
                                                            {"ReLU", {A::ReLU}},
                                                            {"GELU", {A::GELU}},
                                                            {"GELUErf", {A::GELUErf}},
                                                            {"SiLU", {A::SiLU}}};
  for (const auto& [name, act] : activations) cases.push_back({.name = name, .act = act, .bias = true});
  return cases;
}

// A dense tensor of the host in one of the layer's types.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, const std::vector<double>& values) : Tensor(dtype, values.size()) {
    for (size_t i = 0; i < values.size(); i++) set(i, values[i]);
  }
  Tensor(DType dtype, size_t count) : dtype_(dtype), bytes_(count * size_of(dtype), std::byte{0xFF}) {}  // every element a NaN

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  size_t size() const { return bytes_.size() / size_of(dtype_); }
  bool operator==(const Tensor& other) const = default;

  std::vector<double> values() const {
    std::vector<double> out(size());
    for (size_t i = 0; i < out.size(); i++) out[i] = get(i);
    return out;
  }
  double get(size_t i) const {
    switch (dtype_) {
      case DType::F32: return at<float>(i);
      case DType::BF16: return static_cast<float>(at<BF16>(i));
      case DType::F16: return static_cast<float>(at<F16>(i));
      case DType::F64: return at<double>(i);
      case DType::I32: return at<int32_t>(i);
      case DType::I64: return static_cast<double>(at<int64_t>(i));
    }
    return 0;
  }
  void set(size_t i, double v) {
    switch (dtype_) {
      case DType::F32: at<float>(i) = static_cast<float>(v); return;
      case DType::BF16: at<BF16>(i) = BF16(static_cast<float>(v)); return;
      case DType::F16: at<F16>(i) = F16(static_cast<float>(v)); return;
      case DType::F64: at<double>(i) = v; return;
      case DType::I32: at<int32_t>(i) = static_cast<int32_t>(v); return;
      case DType::I64: at<int64_t>(i) = static_cast<int64_t>(v); return;
    }
  }

 private:
  template <class T>
  T& at(size_t i) {
    return reinterpret_cast<T*>(bytes_.data())[i];
  }
  template <class T>
  const T& at(size_t i) const {
    return reinterpret_cast<const T*>(bytes_.data())[i];
  }
  DType dtype_ = DType::F32;
  std::vector<std::byte> bytes_;
};

// One valid pair of a routing, in the order in which the caller lists it.
struct Pair {
  int64_t token, expert;
  double score;
  int64_t slot;  // TopK: t K + k; Lists: list position; Rows: row
};

// A case with data. Values are what the library reads: rounded to the layer's dtype, scores to fp32.
struct Problem {
  Case c;
  Shape shape;
  Tensor x, d_o, addend;                       // [T, d]
  Tensor w1_gate, w1_up, w2;                   // dense [E, n, d], [E, n, d], [E, d, n]
  Tensor b1_gate, b1_up, b2;                   // dense [E, n], [E, n], [E, d]; empty without bias
  std::vector<int32_t> token_ids, expert_ids;  // TopK: expert_ids [T, K]; Lists: triples in shuffled order
  Tensor scores;                               // [R_cap] beside expert_ids
  std::vector<int32_t> counts;                 // Rows
  std::vector<Pair> pairs;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform() { return uniform_(engine_); }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  template <class V>
  void shuffle(V& v) {
    std::shuffle(v.begin(), v.end(), engine_);
  }
  Tensor tensor(DType dtype, int64_t count, double deviation = 1) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& v : values) v = deviation * normal();
    return {dtype, values};
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
};

// The expert ids [T, K] of a pattern.
inline std::vector<int32_t> pattern_ids(const Case& c, Random& random) {
  std::vector<int32_t> ids, all(static_cast<size_t>(c.E));
  std::iota(all.begin(), all.end(), 0);
  const auto below = [&](int64_t n) { return static_cast<int32_t>(random.below(n)); };
  constexpr std::array<int64_t, 4> edges = {1, 127, 128, 129};
  for (int64_t t = 0; t < c.T; t++) {
    switch (c.pattern) {
      case Pattern::OneExpert: ids.push_back(1); break;
      case Pattern::TileEdges: {
        int64_t e = 0, end = edges[0];
        while (t >= end) end += edges[static_cast<size_t>(++e)];
        ids.push_back(static_cast<int32_t>(e));
        break;
      }
      default: {
        std::vector<int32_t> choice = all;
        if (c.pattern == Pattern::EvenExperts) std::erase_if(choice, [](int32_t e) { return e % 2; });
        random.shuffle(choice);
        for (int64_t k = 0; k < c.K; k++) {
          const bool drop = c.pattern == Pattern::AllDropped || (c.pattern == Pattern::Dropped && (t % 7 == 0 || below(3) == 0));
          ids.push_back(drop ? static_cast<int32_t>(c.E) + below(2) : choice[static_cast<size_t>(k)]);
        }
      }
    }
  }
  return ids;
}

inline Problem make_problem(const Case& c, DType dtype, uint64_t seed = 1) {
  Random random(seed);
  Problem p;
  p.c = c;
  const int64_t capacity = c.T * c.K;
  const bool rows = c.kind == RoutingKind::Rows;
  p.shape = {.T = rows ? capacity : c.T,
             .d = c.d,
             .n = c.n,
             .E = c.E,
             .K = c.kind == RoutingKind::TopK ? c.K : 0,
             .R_cap = capacity,
             .kind = c.kind,
             .dtype = dtype,
             .act = c.act};
  const Shape& s = p.shape;
  p.x = random.tensor(dtype, s.T * s.d);
  p.d_o = random.tensor(dtype, s.T * s.d);
  p.addend = random.tensor(dtype, s.T * s.d);
  const double w1 = 1 / std::sqrt(double(s.d)), w2 = 1 / std::sqrt(double(s.n));
  if (c.act.gated()) p.w1_gate = random.tensor(dtype, s.E * s.n * s.d, w1);
  p.w1_up = random.tensor(dtype, s.E * s.n * s.d, w1);
  p.w2 = random.tensor(dtype, s.E * s.d * s.n, w2);
  if (c.bias) {
    if (c.act.gated()) p.b1_gate = random.tensor(dtype, s.E * s.n);
    p.b1_up = random.tensor(dtype, s.E * s.n);
    p.b2 = random.tensor(dtype, s.E * s.d);
  }

  std::vector<int32_t> ids = pattern_ids(c, random), tokens(ids.size());
  for (size_t i = 0; i < ids.size(); i++) tokens[i] = static_cast<int32_t>(static_cast<int64_t>(i) / c.K);
  if (c.kind != RoutingKind::TopK) {  // Lists: any order; Rows: grouped by expert, dropped ones last
    std::vector<size_t> order(ids.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (rows)
      std::stable_sort(order.begin(), order.end(),
                       [&](size_t a, size_t b) { return std::min<int64_t>(ids[a], c.E) < std::min<int64_t>(ids[b], c.E); });
    else random.shuffle(order);
    std::vector<int32_t> moved_ids, moved_tokens;
    for (size_t i : order) moved_ids.push_back(ids[i]), moved_tokens.push_back(tokens[i]);
    ids = moved_ids;
    tokens = moved_tokens;
  }
  p.scores = Tensor(s.accum(), ids.size());
  p.counts.assign(static_cast<size_t>(s.E), 0);
  for (size_t i = 0; i < ids.size(); i++) {
    p.scores.set(i, random.uniform());
    if (ids[i] >= s.E) continue;
    const auto slot = static_cast<int64_t>(i);
    p.pairs.push_back({rows ? slot : tokens[i], ids[i], p.scores.get(i), slot});
    p.counts[static_cast<size_t>(ids[i])]++;
  }
  p.token_ids = tokens;
  p.expert_ids = ids;
  return p;
}

}  // namespace machmoe::test
