// The two forward GEMMs of the CUDA backend against fp64 references written from their definitions, and their times. Runs on a GPU, by hand:
//   forward_driver check                            every case below: poisoned outputs, guard rows, NaN in neighbouring experts, bit-equal second run
//   forward_driver perf [balanced|random] [shapes]  milliseconds and TFLOP/s at the shapes of the published comparisons; sampled values are checked too
#include <cuda_bf16.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/activation.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "work_list.h"

using namespace machmoe;
using bf16 = __nv_bfloat16;

namespace {

// Device memory with guard elements behind it; all of it starts as NaN.
template <class T>
struct Buffer {
  static constexpr size_t kGuard = 1 << 16;
  T* data = nullptr;
  size_t size = 0;
  explicit Buffer(size_t n = 0) : size(n) {
    MACHMOE_CUDA_CALL(cudaMalloc(&data, (n + kGuard) * sizeof(T)));
    poison();
  }
  explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) {
    MACHMOE_CUDA_CALL(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(Buffer&& o) noexcept : data(std::exchange(o.data, nullptr)), size(o.size) {}
  ~Buffer() {
    if (data) cudaFree(data);
  }
  void poison() { MACHMOE_CUDA_CALL(cudaMemset(data, 0xFF, (size + kGuard) * sizeof(T))); }
  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> v(size * sizeof(T));
    MACHMOE_CUDA_CALL(cudaMemcpy(v.data(), data, v.size(), cudaMemcpyDeviceToHost));
    return v;
  }
};

__device__ __host__ uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
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
// Near-normal: the sum of four uniforms.
void fill(bf16* p, size_t n, uint64_t seed, float scale) {
  for_each(n, [=] __device__(size_t i) {
    const uint64_t z = mix((i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull);
    float s = 0;
    for (int k = 0; k < 4; k++) s += float((z >> (16 * k)) & 0xFFFF) / 65536.f - 0.5f;
    p[i] = __float2bfloat16(s * scale * 1.7320508f);
  });
}

enum class Layout { Concatenated, Interleaved, TwoTensors };
constexpr const char* kLayouts[] = {"concatenated", "interleaved", "two tensors"};

struct Case {
  std::string name;
  int64_t T, d, n;
  std::vector<int> counts;  // rows of every expert
  RoutingKind kind = RoutingKind::Lists;
  Activation act = {};
  Layout layout = Layout::Concatenated;
  bool bias = false, store_h = true, store_a = true, scores = true;
  bool nan_neighbours = false;  // every second expert carries NaN in all it owns; the others must not notice
  int64_t spare = 5;            // rows of capacity beyond R
  int64_t K = 0;                // TopK
};

struct Problem {
  Case c;
  Shape s;
  int64_t R = 0, E, planes;
  std::vector<int> token, slot, expert, offsets{0};
  std::vector<float> scores;
  std::vector<int> words;
  bool route() {
    E = static_cast<int64_t>(c.counts.size());
    for (int f : c.counts) offsets.push_back(static_cast<int>(R += f));
    const bool rows = c.kind == RoutingKind::Rows;
    s = {.T = rows ? R + c.spare : c.T, .d = c.d, .n = c.n, .E = E, .K = c.K, .R_cap = R + c.spare, .kind = c.kind, .act = c.act};
    planes = s.planes();
    std::mt19937 rng(7);
    token.assign(s.R_cap, -1);
    scores.assign(s.R_cap, NAN);
    for (int e = 0; e < E; e++) {
      const int64_t half = s.T / 2, low = c.nan_neighbours && e % 2 ? half : 0, count = c.nan_neighbours ? half : s.T;
      for (int r = offsets[e]; r < offsets[e + 1]; r++) {
        token[r] = rows ? r : static_cast<int>(low + rng() % count);
        scores[r] = 0.01f + static_cast<float>(rng() >> 8) / 16777216.f;
        expert.push_back(e);
      }
      if (!rows) std::sort(token.begin() + offsets[e], token.begin() + offsets[e + 1]);
    }
    if (c.kind == RoutingKind::TopK)
      for (int t : token) slot.push_back(t < 0 ? -1 : static_cast<int>(t * c.K + rng() % c.K));
    words = test::work_list_of(offsets, s.R_cap);
    return true;
  }
  bool routed = route();  // before the memory, whose sizes come from it
  struct Memory {
    Buffer<int> token, slot, expert, tiles;
    Buffer<uint32_t> turns;
    Buffer<float> score;
    Buffer<bf16> x, w1, b1, w2, b2, h, a, y, a_in;
    explicit Memory(const Problem& p)
        : token(p.token),
          slot(p.slot),
          expert(p.expert),
          tiles(p.words),
          turns(std::vector<uint32_t>{0}),
          score(p.scores),
          x(p.s.T * p.s.d),
          w1(p.E * p.planes * p.s.n * p.s.d),
          b1(p.E * p.planes * p.s.n),
          w2(p.E * p.s.d * p.s.n),
          b2(p.E * p.s.d),
          h(p.s.R_cap * p.planes * p.s.n),
          a(p.s.R_cap * p.s.n),
          y(p.s.R_cap * p.s.d),
          a_in(p.s.R_cap * p.s.n) {}
  } m{*this};
  ConstWeight w1[2], w2;
  ConstBias b1[2], b2;
  Routing r;

  explicit Problem(Case q) : c(std::move(q)) { prepare(); }
  void prepare() {
    const size_t d = s.d, n = s.n, rows = R;
    const bool dispatched = c.kind == RoutingKind::Rows;
    fill(m.x.data, (dispatched ? R : s.T) * d, 1, 1.f);
    fill(m.w1.data, m.w1.size, 2, 1.f / std::sqrt(static_cast<float>(d)));
    fill(m.w2.data, m.w2.size, 3, 1.f / std::sqrt(static_cast<float>(n)));
    fill(m.b1.data, m.b1.size, 4, 0.5f);
    fill(m.b2.data, m.b2.size, 5, 0.5f);
    fill(m.a_in.data, rows * n, 6, 1.f);
    for (int64_t p = 0; p < planes; p++) {  // element (e, plane, i, j) of W1 under the three layouts, b1 likewise
      const bool two = c.layout == Layout::TwoTensors, mixed = c.layout == Layout::Interleaved;
      const int64_t first = two ? p * E * s.n : mixed ? p : p * s.n, stride = mixed ? planes : 1, per_expert = two ? s.n : planes * s.n;
      w1[p] = {m.w1.data + first * s.d, stride * s.d, per_expert * s.d};
      b1[p] = {m.b1.data + first, stride, per_expert};
    }
    w2 = {m.w2.data, s.n, s.n * s.d};
    b2 = {m.b2.data, 1, s.d};
    if (c.kind == RoutingKind::TopK) r.slot = m.slot.data;
    if (c.kind == RoutingKind::Lists) r.token = m.token.data;
    r.score = c.scores ? m.score.data : nullptr;
    r.tiles = m.tiles.data;
    if (c.nan_neighbours) poison_odd_experts();
  }
  void poison_odd_experts() {
    const bf16 nan = __float2bfloat16(NAN);
    const size_t d = s.d, n = s.n, T = s.T, per1 = planes * n * d;
    const int* ex = m.expert.data;
    bf16 *x = m.x.data, *a = m.a_in.data, *p1 = m.w1.data, *p2 = m.w2.data;
    if (c.kind == RoutingKind::Rows)
      for_each(R * d, [=] __device__(size_t i) {
        if (ex[i / d] % 2) x[i] = nan;
      });
    else for_each(T / 2 * d, [=] __device__(size_t i) { x[T / 2 * d + i] = nan; });
    for_each(E * per1, [=] __device__(size_t i) {
      if (i / per1 % 2) p1[i] = nan;
    });
    for_each(E * n * d, [=] __device__(size_t i) {
      if (i / (n * d) % 2) p2[i] = nan;
    });
    for_each(R * n, [=] __device__(size_t i) {
      if (ex[i / n] % 2) a[i] = nan;
    });
  }
  UpProjArgs up_args() {
    const bool gated = planes == 2;
    return {s,
            r,
            m.x.data,
            gated ? w1[0] : ConstWeight{},
            w1[planes - 1],
            c.bias && gated ? b1[0] : ConstBias{},
            c.bias ? b1[planes - 1] : ConstBias{},
            c.store_h ? m.h.data : nullptr,
            c.store_a ? m.a.data : nullptr,
            m.turns.data};
  }
  DownProjArgs down_args() { return {s, r, m.a_in.data, w2, c.bias ? b2 : ConstBias{}, m.y.data, m.turns.data}; }
};

struct Sums {
  double error, reference;
  unsigned long long nan, disturbed;
};  // disturbed: elements that must have kept their value
struct SumsOnDevice {
  Sums* p;
  SumsOnDevice() {
    MACHMOE_CUDA_CALL(cudaMalloc(&p, sizeof(Sums)));
    MACHMOE_CUDA_CALL(cudaMemset(p, 0, sizeof(Sums)));
  }
  ~SumsOnDevice() { cudaFree(p); }
  Sums get() const {
    Sums v;
    MACHMOE_CUDA_CALL(cudaMemcpy(&v, p, sizeof v, cudaMemcpyDeviceToHost));
    return v;
  }
};
struct Verdict {
  bool ok = true;
  int checks = 0;
  void operator()(const Problem& q, const char* what, const Sums& v, double bound) {
    const double e = v.reference > 0 ? std::sqrt(v.error / v.reference) : std::sqrt(v.error);
    const bool good = e <= bound && v.nan == 0 && v.disturbed == 0;
    ok &= good;
    checks++;
    if (!good || q.c.T > 10000)
      printf("  %-44s %-4s %.2e nan %llu disturbed %llu %s\n", q.c.name.c_str(), what, e, v.nan, v.disturbed, good ? "ok" : "FAIL");
    fflush(stdout);
  }
};
__device__ void note(Sums* out, double have, double want) {
  if (isnan(have)) {
    atomicAdd(&out->nan, 1ull);
    return;
  }
  atomicAdd(&out->error, (have - want) * (have - want));
  atomicAdd(&out->reference, want * want);
}
void untouched(const Buffer<bf16>& b, size_t first, Sums* out) {
  const uint16_t* p = reinterpret_cast<const uint16_t*>(b.data);
  for_each(b.size + Buffer<bf16>::kGuard - first, [=] __device__(size_t i) {
    if (p[first + i] != 0xFFFF) atomicAdd(&out->disturbed, 1ull);
  });
}
struct View {
  const bf16* p;
  int64_t row, expert;
};
View view(const ConstWeight& w) { return {static_cast<const bf16*>(w.base), w.row_stride, w.expert_stride}; }
View view(const ConstBias& b) { return {static_cast<const bf16*>(b.base), b.stride, b.expert_stride}; }

// samples = 0: every element. Odd experts are not looked at when they carry NaN.
template <ActivationKind K>
void verify_up_as(Problem& q, Verdict& verdict, size_t samples) {
  constexpr bool kGated = Activation{K}.gated();
  SumsOnDevice sums_h, sums_a;
  Sums *ph = sums_h.p, *pa = sums_a.p;
  const size_t d = q.s.d, n = q.s.n, R = q.R, planes = q.planes, total = R * n, looked = samples ? std::min(samples, total) : total;
  const bf16 *x = q.m.x.data, *h = q.m.h.data, *a = q.m.a.data;
  const int *token = q.m.token.data, *expert = q.m.expert.data;
  const bool skip = q.c.nan_neighbours, bias = q.c.bias, store_h = q.c.store_h, store_a = q.c.store_a, all = looked == total;
  const View w0 = view(q.w1[0]), w1 = view(q.w1[planes - 1]), b0 = view(q.b1[0]), b1 = view(q.b1[planes - 1]);
  const double alpha = q.s.act.alpha, limit = q.s.act.limit;
  for_each(looked, [=] __device__(size_t index) {
    const size_t i = all ? index : mix(index + 1) % total, row = i / n, c = i % n;
    const int e = expert[row];
    if (skip && e % 2) return;
    double gate = bias ? double(float(b0.p[e * b0.expert + c * b0.row])) : 0, up = bias ? double(float(b1.p[e * b1.expert + c * b1.row])) : 0;
    const bf16 *xr = x + static_cast<size_t>(token[row]) * d, *g = w0.p + e * w0.expert + c * w0.row, *u = w1.p + e * w1.expert + c * w1.row;
    for (size_t k = 0; k < d; k++) {
      if (kGated) gate += double(float(xr[k])) * double(float(g[k]));
      up += double(float(xr[k])) * double(float(u[k]));
    }
    if (store_h && kGated) note(ph, double(float(h[row * 2 * n + c])), gate);
    if (store_h) note(ph, double(float(h[(row * planes + planes - 1) * n + c])), up);
    if (store_a) note(pa, double(float(a[row * n + c])), activate<K, double>(gate, up, alpha, limit).a);
  });
  untouched(q.m.h, store_h ? R * planes * n : 0, ph);
  untouched(q.m.a, store_a ? R * n : 0, pa);
  verdict(q, "H", sums_h.get(), 2.5e-3);
  verdict(q, "A", sums_a.get(), 4e-3);  // of H in bf16
}
void verify_up(Problem& q, Verdict& verdict, size_t samples) {
  dispatch_activation(q.s.act.kind, [&](auto tag) { verify_up_as<decltype(tag)::kind>(q, verdict, samples); });
}
void verify_down(Problem& q, Verdict& verdict, size_t samples) {
  SumsOnDevice sums;
  Sums* out = sums.p;
  const size_t d = q.s.d, n = q.s.n, R = q.R, total = R * d, looked = samples ? std::min(samples, total) : total;
  const bf16 *a = q.m.a_in.data, *y = q.m.y.data;
  const int* expert = q.m.expert.data;
  const float* score = q.m.score.data;
  const bool rows = q.c.kind == RoutingKind::Rows, skip = q.c.nan_neighbours, bias = q.c.bias && rows, scores = q.c.scores && rows,
             all = looked == total;
  const View w = view(q.w2), b = view(q.b2);
  for_each(looked, [=] __device__(size_t index) {
    const size_t i = all ? index : mix(index + 1) % total, row = i / d, c = i % d;
    const int e = expert[row];
    if (skip && e % 2) return;
    double want = bias ? double(float(b.p[e * b.expert + c])) : 0;
    for (size_t k = 0; k < n; k++) want += double(float(a[row * n + k])) * double(float(w.p[e * w.expert + c * w.row + k]));
    note(out, double(float(y[i])), scores ? want * double(score[row]) : want);
  });
  if (rows)
    for_each(q.c.spare * d, [=] __device__(size_t i) {
      if (float(y[R * d + i]) != 0.f) atomicAdd(&out->disturbed, 1ull);
    });
  untouched(q.m.y, rows ? q.s.R_cap * d : R * d, out);
  verdict(q, "Y", sums.get(), 2.5e-3);
}

void run_case(const Case& c, Verdict& verdict) {
  Problem q(c);
  std::vector<uint8_t> first[3];
  for (int rep = 0; rep < 2; rep++) {
    q.m.h.poison();
    q.m.a.poison();
    q.m.y.poison();
    cuda::hopper::up_proj(q.up_args(), {});
    cuda::hopper::down_proj(q.down_args(), {});
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    std::vector<uint8_t> now[3] = {q.m.h.bytes(), q.m.a.bytes(), q.m.y.bytes()};
    if (rep == 1 && !std::equal(now, now + 3, first)) {
      verdict.ok = false;
      printf("  %-44s second run differs FAIL\n", c.name.c_str());
    }
    if (q.m.turns.bytes() != std::vector<uint8_t>(4)) {
      verdict.ok = false;
      printf("  %-44s turns are not 0 after the kernels FAIL\n", c.name.c_str());
    }
    std::move(now, now + 3, first);
  }
  verify_up(q, verdict, 0);
  verify_down(q, verdict, 0);
}

bool check() {
  const std::vector<int> ragged = {0, 1, 127, 128, 129, 300, 64, 513, 0};
  std::vector<Case> cases;
  for (const Layout layout : {Layout::Concatenated, Layout::Interleaved, Layout::TwoTensors})
    for (const auto& [d, n] : {std::pair{320, 192}, {64, 256}, {512, 64}, {8, 8}, {72, 104}, {104, 72}, {200, 328}, {392, 96}})
      cases.push_back({fmt::format("ragged d={} n={} {}", d, n, kLayouts[int(layout)]), 600, d, n, ragged, RoutingKind::Lists, {}, layout});
  constexpr const char* kActivations[] = {"swiglu", "swiglu_oai", "geglu", "reglu", "relu2", "relu", "gelu", "gelu_erf", "silu"};
  for (int k = 0; k <= 8; k++)
    for (const bool bias : {false, true}) {
      const Layout layout = k % 2 ? Layout::Interleaved : Layout::Concatenated;
      cases.push_back(
          {fmt::format("{}{}", kActivations[k], bias ? " bias" : ""), 600, 136, 200, ragged, RoutingKind::Lists, {ActivationKind(k)}, layout, bias});
    }
  cases.push_back({"swiglu limit", 600, 136, 200, ragged, RoutingKind::Lists, {ActivationKind::SwiGLU, 1.f, 0.7f}});
  cases.push_back(
      {"swiglu_oai limit bias", 600, 136, 200, ragged, RoutingKind::Lists, {ActivationKind::SwiGLUOai, 1.702f, 0.7f}, Layout::Interleaved, true});
  for (const int n : {192, 256}) {
    cases.push_back({fmt::format("A alone n={}", n), 600, 320, n, ragged, RoutingKind::Lists, {}, Layout::Concatenated, false, false});
    cases.push_back({fmt::format("H alone n={}", n), 600, 320, n, ragged, RoutingKind::Lists, {}, Layout::Concatenated, false, true, false});
    for (const bool bias : {false, true})
      for (const bool scores : {false, true})
        cases.push_back({fmt::format("rows n={}{}{}", n, bias ? " bias" : "", scores ? " scores" : ""),
                         600,
                         264,
                         n,
                         ragged,
                         RoutingKind::Rows,
                         {},
                         Layout::Concatenated,
                         bias,
                         true,
                         true,
                         scores,
                         false,
                         300});
    for (const RoutingKind kind : {RoutingKind::Lists, RoutingKind::Rows})
      cases.push_back(
          {fmt::format("NaN in odd experts n={}", n), 600, 328, n, ragged, kind, {}, Layout::Concatenated, false, true, true, true, true});
  }
  cases.push_back({"one expert", 600, 320, 256, {777}});
  cases.push_back({"one row", 600, 320, 256, {0, 0, 1}});
  cases.push_back({"no rows", 600, 320, 256, {0, 0, 0}});
  cases.push_back({"no rows, dispatched", 600, 320, 256, {0, 0}, RoutingKind::Rows});
  cases.push_back({"many small experts", 600, 128, 128, std::vector<int>(300, 3)});
  // 18 turns of each of 66 clusters; items of two and of three turns of each, and one more
  cases.push_back({"A: many turns of one k block", 600, 64, 1024, std::vector<int>(300, 3)});
  cases.push_back({"Y: many turns of one k block", 600, 2048, 64, std::vector<int>(300, 3)});
  for (const int experts : {264, 266, 396, 398})
    cases.push_back({fmt::format("{} items", experts / 2), 600, 64, 64, std::vector<int>(static_cast<size_t>(experts), 1)});
  std::mt19937 rng(3);
  for (int i = 0; i < 12; i++) {
    std::vector<int> counts(1 + rng() % 40);
    for (int& f : counts) f = rng() % 3 ? int(rng() % 700) : 0;
    const int d = 8 * (1 + int(rng() % 120)), n = 8 * (1 + int(rng() % 70));
    cases.push_back(
        {fmt::format("random {} d={} n={} E={}", i, d, n, counts.size()), 900, d, n, counts, i % 3 ? RoutingKind::Lists : RoutingKind::Rows});
  }
  for (size_t i = 0; i < cases.size(); i += 2)  // half of the gathered cases by slots
    if (cases[i].kind == RoutingKind::Lists) cases[i].kind = RoutingKind::TopK, cases[i].K = std::array{1, 2, 3, 6, 8, 10, 22}[i / 2 % 7];
  Verdict verdict;
  for (const Case& c : cases) run_case(c, verdict);
  printf("check: %zu cases, %d values, %s\n", cases.size(), verdict.checks, verdict.ok ? "ALL OK" : "FAILED");
  return verdict.ok;
}

struct Named {
  const char* name;
  int64_t T, d, n, E, K;
};
constexpr Named kShapes[] = {
    {"30B-n1024-K4", 32768, 4096, 1024, 64, 4},    {"30B-n512-K8", 32768, 4096, 512, 128, 8}, {"30B-n256-K16", 32768, 4096, 256, 256, 16},
    {"7B-n1024-K2", 24576, 1536, 1024, 32, 2},     {"7B-n512-K4", 24576, 1536, 512, 64, 4},   {"7B-n256-K8", 24576, 1536, 256, 128, 8},
    {"1.4B-n256-K8", 40960, 768, 256, 128, 8},     {"OLMoE-1B-7B", 32768, 2048, 1024, 64, 8}, {"Qwen3-30B-A3B", 32768, 2048, 768, 128, 8},
    {"Qwen3-Next-80B", 32768, 2048, 512, 512, 10}, {"gpt-oss-20b", 32768, 2880, 2880, 32, 4}, {"DeepSeek-V3", 16384, 7168, 2048, 256, 8}};

// Rows of each expert: all equal, or those of K distinct uniform experts a token.
std::vector<int> counts_of(const Named& q, bool random) {
  std::vector<int> counts(q.E, static_cast<int>(q.T * q.K / q.E));
  if (!random) return counts;
  std::fill(counts.begin(), counts.end(), 0);
  std::mt19937_64 rng(11);
  std::vector<int> taken(q.E, -1);
  for (int t = 0; t < q.T; t++)
    for (int k = 0; k < q.K;) {
      const int e = static_cast<int>(rng() % q.E);
      if (taken[e] != t) {
        taken[e] = t;
        counts[e]++;
        k++;
      }
    }
  return counts;
}

// Milliseconds: after 40 ms of rest (burst), and the mean of 100 ms after 150 ms of the same work (soaked: the power limit acts).
struct Time {
  float burst, soaked;
};
template <class F>
Time time_of(const F& run) {
  cudaEvent_t a, b;
  MACHMOE_CUDA_CALL(cudaEventCreate(&a));
  MACHMOE_CUDA_CALL(cudaEventCreate(&b));
  auto timed = [&](int n) {
    MACHMOE_CUDA_CALL(cudaEventRecord(a));
    for (int i = 0; i < n; i++) run();
    MACHMOE_CUDA_CALL(cudaEventRecord(b));
    MACHMOE_CUDA_CALL(cudaEventSynchronize(b));
    float ms;
    MACHMOE_CUDA_CALL(cudaEventElapsedTime(&ms, a, b));
    return ms / n;
  };
  std::vector<float> bursts;
  for (int i = 0; i < 3; i++) {
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    usleep(40000);
    run();
    bursts.push_back(timed(2));
  }
  std::sort(bursts.begin(), bursts.end());
  const int n = std::max(3, static_cast<int>(100.f / bursts[1]));
  timed(n + n / 2);
  return {bursts[1], timed(n)};
}

// The yardstick: a dense batched product of the same FLOPs by cuBLAS, where it is installed.
struct Cublas {
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, long long, const void*, int, int, long long, const void*,
                       void*, int, int, long long, int, int, int);
  void* handle = nullptr;
  Gemm gemm = nullptr;
  Cublas() {
    void* so = dlopen("libcublas.so.13", RTLD_NOW);
    if (!so) return;
    gemm = reinterpret_cast<Gemm>(dlsym(so, "cublasGemmStridedBatchedEx"));
    if (reinterpret_cast<int (*)(void**)>(dlsym(so, "cublasCreate_v2"))(&handle)) gemm = nullptr;
  }
  // c[b] (rows x cols) = a[b] (rows x k) w[b]^T (cols x k), all row-major bf16, fp32 accumulation.
  void operator()(int64_t rows, int64_t cols, int64_t k, const void* a, const void* w, void* c, int64_t batch) const {
    constexpr int kTransposed = 1, kPlain = 0, kBf16 = 14, kFp32 = 68;
    const float one = 1, zero = 0;
    if (gemm(handle, kTransposed, kPlain, int(cols), int(rows), int(k), &one, w, kBf16, int(k), cols * k, a, kBf16, int(k), rows * k, &zero, c, kBf16,
             int(cols), rows * cols, int(batch), kFp32, -1))
      throw Error(Status::Backend, "cublasGemmStridedBatchedEx failed");
  }
};

bool perf(bool random, const char* only) {
  Verdict verdict;
  const Cublas blas;
  printf("%-16s | burst ms TFLOP/s, soaked ms TFLOP/s of up-projection |%s down-projection%s\n", random ? "random routing" : "balanced",
         blas.gemm && !random ? " cuBLAS |" : "", blas.gemm && !random ? " | cuBLAS" : "");
  for (const Named& named : kShapes) {
    if (only && !strstr(only, named.name)) continue;
    Problem q({named.name, named.T, named.d, named.n, counts_of(named, random)});
    const UpProjArgs up = q.up_args();
    const DownProjArgs down = q.down_args();
    cuda::hopper::up_proj(up, {});
    cuda::hopper::down_proj(down, {});
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    verify_up(q, verdict, 20000);
    verify_down(q, verdict, 20000);
    const double flop = 2. * q.R * q.s.n * q.s.d / 1e9;
    printf("%-16s", named.name);
    auto report = [&](double gflop, const auto& run) {
      const Time t = time_of(run);
      printf(" | %.4f %4.0f %.4f %4.0f", t.burst, gflop / t.burst, t.soaked, gflop / t.soaked);
    };
    const bool dense = blas.gemm && !random;
    Buffer<bf16> gathered(dense ? q.R * q.s.d : 0);
    if (dense) fill(gathered.data, gathered.size, 8, 1.f);
    report(2 * flop, [&] { cuda::hopper::up_proj(up, {}); });
    if (dense) report(2 * flop, [&] { blas(q.R / q.E, 2 * q.s.n, q.s.d, gathered.data, q.m.w1.data, q.m.h.data, q.E); });
    report(flop, [&] { cuda::hopper::down_proj(down, {}); });
    if (dense) report(flop, [&] { blas(q.R / q.E, q.s.d, q.s.n, q.m.a_in.data, q.m.w2.data, q.m.y.data, q.E); });
    printf("\n");
    fflush(stdout);
  }
  return verdict.ok;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  try {
    return !(mode == "perf" ? perf(argc > 2 && !strcmp(argv[2], "random"), argc > 3 ? argv[3] : nullptr) : check());
  } catch (const std::exception& e) {
    printf("%s\n", e.what());
    return 1;
  }
}
