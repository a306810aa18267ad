// What a product of a layer works on: a case, its rows drawn at random, its inputs and weights on the device.
#pragma once
#include <cuda_bf16.h>

#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "device.h"
#include "ops.h"
#include "work_list.h"

namespace machmoe::test {

using bf16 = __nv_bfloat16;

template <class F>
__global__ void for_each_kernel(size_t n, F f) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x) f(i);
}
template <class F>
void for_each(size_t n, F f) {
  if (n == 0) return;
  for_each_kernel<<<2112, 256>>>(n, f);
  MACHMOE_CUDA_CALL(cudaGetLastError());
}

__device__ inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
// Near-normal, variance 1: the sum of four uniforms.
__device__ inline float normal(uint64_t i, uint64_t seed) {
  const uint64_t z = mix((i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull);
  float s = 0;
  for (int k = 0; k < 4; k++) s += float((z >> (16 * k)) & 0xFFFF) / 65536.f - 0.5f;
  return s * 1.7320508f;
}
template <class T>
void fill(T* p, size_t n, uint64_t seed, float scale = 1) {
  for_each(n, [=] __device__(size_t i) { p[i] = T(scale * normal(i, seed)); });
}

enum class Layout { Concatenated, Interleaved, TwoTensors };

struct Case {
  std::string name;
  int64_t T, d, n;
  std::vector<int> counts;  // rows of every expert
  RoutingKind kind = RoutingKind::Lists;
  Activation act = {};
  Layout layout = Layout::Concatenated;
  bool bias = false;
  bool nan_neighbours = false;                         // every second expert carries NaN in all it owns; the others must not notice
  int64_t spare = 5;                                   // rows of capacity beyond R
  int64_t K = 0;                                       // TopK
  bool store_h = true, store_a = true, scores = true;  // forward
  DType out_dtype = DType::BF16;                       // of the weight gradients
  bool accumulate = false;                             // likewise
};
// Half of the gathered cases become top-K.
inline void half_by_slots(std::vector<Case>& cases) {
  for (size_t i = 0; i < cases.size(); i += 2)
    if (cases[i].kind == RoutingKind::Lists) cases[i].kind = RoutingKind::TopK, cases[i].K = std::array{1, 2, 3, 6, 8, 10, 22}[i / 2 % 7];
}
// The shapes of the published comparisons, every expert with the same rows (balanced) or with those of K distinct uniform experts a token.
inline std::vector<Case> published_cases(bool random) {
  constexpr struct {
    const char* name;
    int64_t T, d, n, E, K;
  } kShapes[] = {
      {"30B-n1024-K4", 32768, 4096, 1024, 64, 4},    {"30B-n512-K8", 32768, 4096, 512, 128, 8}, {"30B-n256-K16", 32768, 4096, 256, 256, 16},
      {"7B-n1024-K2", 24576, 1536, 1024, 32, 2},     {"7B-n512-K4", 24576, 1536, 512, 64, 4},   {"7B-n256-K8", 24576, 1536, 256, 128, 8},
      {"1.4B-n256-K8", 40960, 768, 256, 128, 8},     {"OLMoE-1B-7B", 32768, 2048, 1024, 64, 8}, {"Qwen3-30B-A3B", 32768, 2048, 768, 128, 8},
      {"Qwen3-Next-80B", 32768, 2048, 512, 512, 10}, {"gpt-oss-20b", 32768, 2880, 2880, 32, 4}, {"DeepSeek-V3", 16384, 7168, 2048, 256, 8}};
  std::vector<Case> cases;
  for (const auto& q : kShapes) {
    std::vector<int> counts(q.E, random ? 0 : static_cast<int>(q.T * q.K / q.E)), last(q.E, -1);  // last: the token that chose an expert last
    std::mt19937_64 rng(11);
    for (int t = 0; random && t < q.T; t++)
      for (int k = 0; k < q.K;) {
        const size_t e = rng() % q.E;
        if (std::exchange(last[e], t) == t) continue;
        counts[e]++;
        k++;
      }
    cases.push_back({.name = q.name, .T = q.T, .d = q.d, .n = q.n, .counts = counts, .spare = 0});
  }
  return cases;
}

// The rows of a case, grouped by expert: tokens ascending within one, any slot of the token, scores. What no row has is -1 or NaN.
struct Rows {
  std::vector<int> token, slot, expert, offsets{0};
  std::vector<float> score, slot_score;
  Rows(const Case& c, const Shape& s) : token(s.R_cap, -1), slot(s.R_cap, -1), score(s.R_cap, NAN), slot_score(s.T * s.K, NAN) {
    std::mt19937 rng(7);
    for (int e = 0; e < s.E; e++) {
      const int64_t half = s.T / 2, low = c.nan_neighbours && e % 2 ? half : 0, count = c.nan_neighbours ? half : s.T;
      for (int i = 0; i < c.counts[e]; i++) {
        const size_t row = expert.size();
        token[row] = static_cast<int>(s.kind == RoutingKind::Rows ? row : low + rng() % count);
        score[row] = 0.01f + static_cast<float>(rng() >> 8) / 16777216.f;
        expert.push_back(e);
      }
      offsets.push_back(static_cast<int>(expert.size()));
      std::sort(token.begin() + offsets[e], token.begin() + offsets[e + 1]);
    }
    for (size_t row = 0; s.kind == RoutingKind::TopK && row < expert.size(); row++) {
      slot[row] = static_cast<int>(token[row] * s.K + rng() % s.K);
      float& of_slot = slot_score[slot[row]];  // rows of the same slot have the same score
      if (std::isnan(of_slot)) of_slot = score[row];
      score[row] = of_slot;
    }
  }
};

inline Shape shape_of(const Case& c) {
  const int64_t E = static_cast<int64_t>(c.counts.size()), R_cap = std::accumulate(c.counts.begin(), c.counts.end(), c.spare);
  return {.T = c.kind == RoutingKind::Rows ? R_cap : c.T, .d = c.d, .n = c.n, .E = E, .K = c.K, .R_cap = R_cap, .kind = c.kind, .act = c.act};
}

// A case on the device. Rows past R of every tensor stay NaN.
struct Problem {
  explicit Problem(const Case& q) : c(q) {}

  Case c;
  Shape s = shape_of(c);
  int64_t R = s.R_cap - c.spare, planes = s.planes();
  Rows rows{c, s};
  Buffer<int> token{rows.token}, slot{rows.slot}, expert{rows.expert}, offsets{rows.offsets}, tiles{work_list_of(rows.offsets, s.R_cap)};
  Buffer<uint32_t> turns{std::vector<uint32_t>{0}};
  Buffer<float> score{rows.score}, slot_score{rows.slot_score};
  Routing r = routing();
  Buffer<bf16> x = of_tokens(1), w1 = of_experts(planes * s.n * s.d, 2, 1 / std::sqrt(static_cast<float>(s.d))),
               w2 = of_experts(s.d * s.n, 3, 1 / std::sqrt(static_cast<float>(s.n))), b2 = of_experts(s.d, 4);

  Routing routing() const {
    const bool by_slots = s.kind == RoutingKind::TopK;
    float* scores = by_slots ? slot_score.data() : score.data();
    return {.slot = by_slots ? slot.data() : nullptr,
            .token = s.kind == RoutingKind::Lists ? token.data() : nullptr,
            .score = c.scores ? scores : nullptr,
            .offsets = offsets.data(),
            .tiles = tiles.data()};
  }
  // Random tensors: [tokens, d], [rows, width], size elements of every expert. With NaN neighbours what odd experts own of them is NaN.
  Buffer<bf16> of_tokens(uint64_t seed) const {
    if (s.kind == RoutingKind::Rows) return of_rows(s.d, seed);
    Buffer<bf16> b(s.T * s.d);
    bf16* p = b.data();
    const size_t odd = c.nan_neighbours ? s.T / 2 * s.d : b.size();
    for_each(b.size(), [=] __device__(size_t i) { p[i] = i >= odd ? NAN : normal(i, seed); });
    return b;
  }
  Buffer<bf16> of_rows(int64_t width, uint64_t seed, float scale = 1, bool edge = false) const {
    Buffer<bf16> b = empty_rows(width, edge);
    bf16* p = b.data();
    const int* e = expert.data();
    const bool odd = c.nan_neighbours;
    for_each(R * width, [=] __device__(size_t i) { p[i] = odd && e[i / width] % 2 ? NAN : scale * normal(i, seed); });
    return b;
  }
  Buffer<bf16> of_experts(int64_t size, uint64_t seed, float scale = 1) const {
    Buffer<bf16> b(s.E * size);
    bf16* p = b.data();
    const bool odd = c.nan_neighbours;
    for_each(b.size(), [=] __device__(size_t i) { p[i] = odd && i / size % 2 ? NAN : scale * normal(i, seed); });
    return b;
  }
  Buffer<bf16> empty_rows(int64_t width, bool edge = false) const { return Buffer<bf16>(s.R_cap * width, edge); }

  // A plane of W1, dW1 or b1 in the case's layout: its row i of expert e is the row first + e per_expert + i stride of the tensor.
  struct Plane {
    int64_t first, stride, per_expert;
  };
  Plane plane(int64_t p) const {
    const bool two = c.layout == Layout::TwoTensors, mixed = c.layout == Layout::Interleaved;
    return {two ? p * s.E * s.n : mixed ? p : p * s.n, mixed ? planes : 1, two ? s.n : planes * s.n};
  }
  ConstWeight w1_plane(int64_t p) const {
    const auto [first, stride, per_expert] = plane(p);
    return {w1.data() + first * s.d, stride * s.d, per_expert * s.d};
  }
  ConstWeight w1_gate() const { return planes == 2 ? w1_plane(0) : ConstWeight{}; }
  ConstWeight w1_up() const { return w1_plane(planes - 1); }
  ConstWeight w2_view() const { return {w2.data(), s.n, s.n * s.d}; }
  ConstBias b2_view() const { return {c.bias ? b2.data() : nullptr, 1, s.d}; }
};

}  // namespace machmoe::test
