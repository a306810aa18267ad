// The four backward GEMMs of the CUDA backend against fp64 references written from their definitions, and their times. Compiled with --extended-lambda
// and linked to the objects of src/cuda; runs on a GPU, by hand:
//   backward_driver check                  every case below: poisoned outputs, guard rows, NaN in neighbouring experts, bit-equal second run with
//                                          dH over H
//   backward_driver perf [random] [shape]  milliseconds and TFLOP/s at the shapes of the published comparisons; sampled values are checked too
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/activation.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "edge_memory.h"
#include "work_list.h"

#include <cuda_bf16.h>

using namespace machmoe;
using bf16 = __nv_bfloat16;

namespace {

#define CHECK_CUDA(call) MACHMOE_CUDA_CALL(call)

// Device memory with guard elements behind it; all of it starts as NaN. edge: nothing is mapped before it.
template <class T>
struct Buffer {
  static constexpr size_t kGuard = 4096;
  std::shared_ptr<void> memory;
  T* data = nullptr;
  size_t size = 0;
  Buffer() = default;
  explicit Buffer(size_t n, bool edge = false) : size(n) {
    const size_t bytes = (n + kGuard) * sizeof(T);
    if (edge) {
      memory = test::edge_memory(bytes);
    } else {
      void* p = nullptr;
      CHECK_CUDA(cudaMalloc(&p, bytes));
      memory = {p, cudaFree};
    }
    data = static_cast<T*>(memory.get());
    poison();
  }
  void poison() { CHECK_CUDA(cudaMemset(data, 0xFF, (size + kGuard) * sizeof(T))); }
  void upload(const std::vector<T>& v) { CHECK_CUDA(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
  std::vector<T> download() const {
    std::vector<T> v(size);
    CHECK_CUDA(cudaMemcpy(v.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
};

__device__ uint64_t mix(uint64_t z) {
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
  CHECK_CUDA(cudaGetLastError());
}
// Near-normal, variance scale^2: the sum of four uniforms.
__device__ float normal(uint64_t i, uint64_t seed) {
  const uint64_t z = mix((i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull);
  float s = 0;
  for (int k = 0; k < 4; k++) s += float((z >> (16 * k)) & 0xFFFF) / 65536.f - 0.5f;
  return s * 1.7320508f;
}
template <class T>
void fill(T* p, size_t n, uint64_t seed, float scale) {
  for_each(n, [=] __device__(size_t i) { p[i] = T(scale * normal(i, seed)); });
}

enum class Layout { Concatenated, Interleaved, TwoTensors };

struct Case {
  std::string name;
  int64_t T, d, n, E;
  std::vector<int> counts;  // rows of every expert
  RoutingKind kind = RoutingKind::Lists;
  Activation act = {};
  Layout layout = Layout::Concatenated;
  DType out_dtype = DType::BF16;
  bool accumulate = false, bias = false;
  bool nan_neighbours = false;  // every second expert carries NaN in all it owns; the others must not notice
  int64_t spare = 5;            // rows of capacity beyond R
  int64_t K = 0;                // TopK
};

struct Problem {
  Case c;
  Shape s;
  Routing r;
  int64_t R = 0, planes, parts;
  std::vector<int> offsets, expert;
  Buffer<int> d_token, d_slot, d_offsets, d_expert, d_tiles;
  Buffer<uint32_t> turns;
  Buffer<float> score, slot_score, ds;  // score: of the rows, for the references
  Buffer<bf16> x, d_o, w1, w2, b2, h, dh_in, a_in, dh, a_prime, dx;
  Buffer<uint8_t> dw1, dw2;
  size_t element;
  ConstWeight w1_view[2];
  MutableWeight dw1_view[2];

  explicit Problem(Case q) : c(std::move(q)) {
    offsets.push_back(0);
    for (int n : c.counts) {
      R += n;
      offsets.push_back(static_cast<int>(R));
    }
    const bool rows = c.kind == RoutingKind::Rows;
    s = {.T = rows ? R + c.spare : c.T, .d = c.d, .n = c.n, .E = c.E, .K = c.K, .R_cap = R + c.spare, .kind = c.kind, .act = c.act};
    planes = s.planes();
    parts = cuda::hopper::ds_parts(s);
    element = size_of(c.out_dtype);

    std::mt19937 rng(7);
    std::vector<int> token(s.R_cap, -1);
    std::vector<float> sc(s.R_cap, NAN);
    for (int e = 0; e < c.E; e++) {
      const int64_t half = s.T / 2, low = c.nan_neighbours && e % 2 ? half : 0, count = c.nan_neighbours ? half : s.T;
      std::vector<int> list;
      for (int i = 0; i < c.counts[e]; i++) list.push_back(static_cast<int>(low + rng() % count));
      std::sort(list.begin(), list.end());
      for (int i = 0; i < c.counts[e]; i++) {
        token[offsets[e] + i] = list[i];
        sc[offsets[e] + i] = 0.01f + static_cast<float>(rng() >> 8) / 16777216.f;
        expert.push_back(e);
      }
    }
    if (rows)
      for (int64_t i = 0; i < R; i++) token[i] = static_cast<int>(i);
    if (c.kind == RoutingKind::TopK) {  // rows of the same slot have the same score
      std::vector<int> slot(s.R_cap, -1);
      std::vector<float> by_slot(s.T * c.K, NAN);
      for (int64_t row = 0; row < R; row++) {
        slot[row] = static_cast<int>(token[row] * c.K + rng() % c.K);
        if (std::isnan(by_slot[slot[row]])) by_slot[slot[row]] = sc[row];
        sc[row] = by_slot[slot[row]];
      }
      d_slot = Buffer<int>(s.R_cap);
      d_slot.upload(slot);
      slot_score = Buffer<float>(by_slot.size());
      slot_score.upload(by_slot);
    }
    d_token = Buffer<int>(s.R_cap);
    d_token.upload(token);
    score = Buffer<float>(s.R_cap);
    score.upload(sc);
    d_offsets = Buffer<int>(c.E + 1);
    d_offsets.upload(offsets);
    d_expert = Buffer<int>(R);
    d_expert.upload(expert);
    const std::vector<int> words = test::work_list_of(offsets, s.R_cap);
    turns = Buffer<uint32_t>(1);
    turns.upload({0});
    d_tiles = Buffer<int>(words.size());
    d_tiles.upload(words);
    if (c.kind == RoutingKind::TopK) r.slot = d_slot.data;
    if (c.kind == RoutingKind::Lists) r.token = d_token.data;
    r.score = c.kind == RoutingKind::TopK ? slot_score.data : score.data;
    r.offsets = d_offsets.data;
    r.tiles = d_tiles.data;

    const size_t T = s.T, d = s.d, n = s.n, E = s.E, cap = s.R_cap;
    x = Buffer<bf16>(T * d);
    d_o = Buffer<bf16>(T * d);
    w1 = Buffer<bf16>(E * planes * n * d);
    w2 = Buffer<bf16>(E * d * n);
    b2 = Buffer<bf16>(E * d);
    h = Buffer<bf16>(cap * planes * n);
    dh_in = Buffer<bf16>(cap * planes * n, true);
    a_in = Buffer<bf16>(cap * n, true);
    dh = Buffer<bf16>(cap * planes * n, true);
    a_prime = Buffer<bf16>(cap * n, true);
    dx = Buffer<bf16>(cap * d, true);
    ds = Buffer<float>(parts * cap);
    dw1 = Buffer<uint8_t>(E * planes * n * d * element);
    dw2 = Buffer<uint8_t>(E * d * n * element);
    const size_t valid = rows ? R : T;
    fill(x.data, valid * d, 1, 1.f);
    fill(d_o.data, valid * d, 2, 1.f);
    fill(b2.data, E * d, 3, 1.f);
    fill(w1.data, w1.size, 4, 1.f / std::sqrt(static_cast<float>(d)));
    fill(w2.data, w2.size, 5, 1.f / std::sqrt(static_cast<float>(n)));
    fill(h.data, R * planes * n, 6, 1.5f);
    fill(dh_in.data, R * planes * n, 7, 1.f);
    fill(a_in.data, R * n, 8, 1.f);
    if (c.nan_neighbours) poison_odd_experts();
    // Element (e, plane, i, j) of W1 and dW1 under the three layouts.
    const int64_t N = n, D = d;
    for (int64_t p = 0; p < planes; p++) {
      const bool two = c.layout == Layout::TwoTensors, mixed = c.layout == Layout::Interleaved;
      const int64_t first = two ? p * c.E * N * D : mixed ? p * D : p * N * D;
      w1_view[p] = {w1.data + first, mixed ? planes * D : D, two ? N * D : planes * N * D};
      dw1_view[p] = {dw1.data + first * element, w1_view[p].row_stride, w1_view[p].expert_stride};
    }
    if (c.accumulate) {
      start(dw1);
      start(dw2);
    }
  }
  void poison_odd_experts() {
    const size_t T = s.T, d = s.d, n = s.n, E = s.E;
    const bool rows = c.kind == RoutingKind::Rows;
    const bf16 nan = __float2bfloat16(NAN);
    bf16 *px = x.data, *po = d_o.data, *p1 = w1.data, *p2 = w2.data, *pb = b2.data, *ph = h.data, *pd = dh_in.data, *pa = a_in.data;
    const int* ex = d_expert.data;
    if (!rows) for_each(T / 2 * d, [=] __device__(size_t i) { px[T / 2 * d + i] = po[T / 2 * d + i] = nan; });
    else
      for_each(R * d, [=] __device__(size_t i) {
        if (ex[i / d] % 2) px[i] = po[i] = nan;
      });
    const size_t per1 = planes * n * d, per2 = n * d, wide = planes * n;
    for_each(E * per1, [=] __device__(size_t i) {
      if (i / per1 % 2) p1[i] = nan;
    });
    for_each(E * per2, [=] __device__(size_t i) {
      if (i / per2 % 2) p2[i] = nan;
    });
    for_each(E * d, [=] __device__(size_t i) {
      if (i / d % 2) pb[i] = nan;
    });
    for_each(R * wide, [=] __device__(size_t i) {
      if (ex[i / wide] % 2) ph[i] = pd[i] = nan;
    });
    for_each(R * n, [=] __device__(size_t i) {
      if (ex[i / n] % 2) pa[i] = nan;
    });
  }
  // What the accumulator holds before the run: element i is normal(i, 9), rounded to the type.
  void start(Buffer<uint8_t>& b) {
    if (c.out_dtype == DType::F32) fill(reinterpret_cast<float*>(b.data), b.size / 4, 9, 1.f);
    else fill(reinterpret_cast<bf16*>(b.data), b.size / 2, 9, 1.f);
  }

  WeightGradW2Args dw2_args() { return {s, r, d_o.data, a_in.data, {dw2.data, s.n, s.n * s.d}, c.out_dtype, c.accumulate, turns.data}; }
  WeightGradW1Args dw1_args() {
    const bool gated = planes == 2;
    return {s, r, x.data, dh_in.data, gated ? dw1_view[0] : MutableWeight{}, dw1_view[planes - 1], c.out_dtype, c.accumulate, turns.data};
  }
  DownProjBwdArgs dh_args(bool over_h = false) {
    const bf16* from = over_h ? dh.data : h.data;
    if (over_h) CHECK_CUDA(cudaMemcpy(dh.data, h.data, R * planes * s.n * sizeof(bf16), cudaMemcpyDeviceToDevice));
    return {s, r, d_o.data, {w2.data, s.n, s.n * s.d}, {c.bias ? b2.data : nullptr, 1, s.d}, from, dh.data, a_prime.data, ds.data, turns.data};
  }
  UpProjBwdArgs dx_args() { return {s, r, dh_in.data, planes == 2 ? w1_view[0] : ConstWeight{}, w1_view[planes - 1], dx.data, turns.data}; }
};

struct Sums {
  double error, reference;
  unsigned long long nan, disturbed;
};  // disturbed: elements that must have kept their value

struct Verdict {
  bool ok = true;
  void operator()(const Problem& q, const char* what, const Sums& v, double bound) {
    const double e = v.reference > 0 ? std::sqrt(v.error / v.reference) : std::sqrt(v.error);
    const bool good = e <= bound && v.nan == 0 && v.disturbed == 0;
    ok &= good;
    if (!good || q.c.T > 10000)
      printf("  %-34s %-5s %.2e nan %llu disturbed %llu %s\n", q.c.name.c_str(), what, e, v.nan, v.disturbed, good ? "ok" : "FAIL");
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
template <class T>
__device__ bool poisoned(const T* p) {
  for (size_t i = 0; i < sizeof(T); i++)
    if (reinterpret_cast<const uint8_t*>(p)[i] != 0xFF) return false;
  return true;
}
struct SumsOnDevice {
  Sums* p;
  SumsOnDevice() {
    CHECK_CUDA(cudaMalloc(&p, sizeof(Sums)));
    CHECK_CUDA(cudaMemset(p, 0, sizeof(Sums)));
  }
  ~SumsOnDevice() { cudaFree(p); }
  Sums get() const {
    Sums v;
    CHECK_CUDA(cudaMemcpy(&v, p, sizeof v, cudaMemcpyDeviceToHost));
    return v;
  }
};
template <class T>
void guards(const Buffer<T>& b, size_t first_untouched, Sums* out) {
  const T* p = b.data;
  for_each(b.size + Buffer<T>::kGuard - first_untouched, [=] __device__(size_t i) {
    if (!poisoned(p + first_untouched + i)) atomicAdd(&out->disturbed, 1ull);
  });
}

// samples = 0: every row. Odd experts are not looked at when they carry NaN.
template <ActivationKind K>
void verify_dh_as(Problem& q, Verdict& verdict, size_t samples) {
  SumsOnDevice dh, a, ds;
  Sums *p_dh = dh.p, *p_a = a.p, *p_ds = ds.p;
  const size_t d = q.s.d, n = q.s.n, R = q.R, cap = q.s.R_cap, planes = q.planes, parts = q.parts;
  const bf16 *d_o = q.d_o.data, *w2 = q.w2.data, *h = q.h.data, *out_h = q.dh.data, *out_a = q.a_prime.data, *b2 = q.c.bias ? q.b2.data : nullptr;
  const float *score = q.score.data, *out_ds = q.ds.data, alpha = q.s.act.alpha, limit = q.s.act.limit;
  const int *token = q.d_token.data, *expert = q.d_expert.data;
  const bool skip = q.c.nan_neighbours;
  Buffer<double> dot(R + 1);
  double* p_dot = dot.data;
  CHECK_CUDA(cudaMemset(p_dot, 0, (R + 1) * 8));
  const size_t rows = samples ? std::min(samples, R) : R, stride = rows ? R / rows : 1;
  for_each(rows * n, [=] __device__(size_t i) {
    const size_t row = i / n * stride, c = i % n, e = expert[row];
    if (skip && e % 2) return;
    double da = 0;
    for (size_t k = 0; k < d; k++) da += double(float(d_o[token[row] * d + k])) * double(float(w2[(e * d + k) * n + c]));
    const double gate = planes == 2 ? double(float(h[row * 2 * n + c])) : 0., up = double(float(h[(row * planes + planes - 1) * n + c])),
                 s = double(score[row]);
    const auto act = activate<K, double>(gate, up, double(alpha), double(limit));
    atomicAdd(p_dot + row, da * act.a);
    if (planes == 2) note(p_dh, double(float(out_h[row * 2 * n + c])), s * da * act.d_gate);
    note(p_dh, double(float(out_h[(row * planes + planes - 1) * n + c])), s * da * act.d_up);
    note(p_a, double(float(out_a[row * n + c])), s * act.a);
  });
  for_each(rows, [=] __device__(size_t i) {
    const size_t row = i * stride, e = expert[row];
    if (skip && e % 2) return;
    double want = p_dot[row], have = 0;
    if (b2)
      for (size_t k = 0; k < d; k++) want += double(float(d_o[token[row] * d + k])) * double(float(b2[e * d + k]));
    for (size_t part = 0; part < parts; part++) have += double(out_ds[part * cap + row]);
    note(p_ds, have, want);
  });
  guards(q.dh, R * planes * n, dh.p);
  guards(q.a_prime, R * n, a.p);
  for_each(parts * (cap - R), [=] __device__(size_t i) {
    if (!poisoned(out_ds + i / (cap - R) * cap + R + i % (cap - R))) atomicAdd(&p_ds->disturbed, 1ull);
  });
  guards(q.ds, parts * cap, ds.p);
  verdict(q, "dH", dh.get(), 4e-3);
  verdict(q, "A'", a.get(), 4e-3);
  verdict(q, "dS", ds.get(), 4e-3);  // of dA' in bf16
}
void verify_dh(Problem& q, Verdict& verdict, size_t samples) {
  dispatch_activation(q.s.act.kind, [&](auto tag) { verify_dh_as<decltype(tag)::kind>(q, verdict, samples); });
}

struct View {
  const bf16* p;
  int64_t row, expert;
};
void verify_dx(Problem& q, Verdict& verdict, size_t samples) {
  SumsOnDevice sums;
  Sums* out = sums.p;
  const size_t d = q.s.d, n = q.s.n, R = q.R, cap = q.s.R_cap, planes = q.planes;
  const bf16 *dh = q.dh_in.data, *dx = q.dx.data;
  const int* expert = q.d_expert.data;
  const bool skip = q.c.nan_neighbours;
  View w[2];
  for (size_t i = 0; i < planes; i++) w[i] = {static_cast<const bf16*>(q.w1_view[i].base), q.w1_view[i].row_stride, q.w1_view[i].expert_stride};
  const View w0 = w[0], w1 = w[planes - 1];
  const size_t rows = samples ? std::min(samples, R) : R, stride = rows ? R / rows : 1;
  for_each(rows * d, [=] __device__(size_t i) {
    const size_t row = i / d * stride, c = i % d, e = expert[row];
    if (skip && e % 2) return;
    double want = 0;
    for (size_t k = 0; k < planes * n; k++) {
      const View& v = k < (planes - 1) * n ? w0 : w1;
      want += double(float(dh[row * planes * n + k])) * double(float(v.p[e * v.expert + k % n * v.row + c]));
    }
    note(out, double(float(dx[row * d + c])), want);
  });
  if (q.s.kind == RoutingKind::Rows) {
    for_each((cap - R) * d, [=] __device__(size_t i) {
      if (float(dx[R * d + i]) != 0.f) atomicAdd(&out->disturbed, 1ull);
    });
    guards(q.dx, cap * d, out);
  } else {
    guards(q.dx, R * d, out);
  }
  verdict(q, "dX~", sums.get(), 4e-3);
}

template <class Out>
void verify_dw_as(Problem& q, Verdict& verdict, bool first, size_t samples) {
  SumsOnDevice sums;
  Sums* out = sums.p;
  const size_t d = q.s.d, n = q.s.n, E = q.s.E, planes = first ? q.planes : 1;
  const bf16 *g = first ? q.x.data : q.d_o.data, *c = first ? q.dh_in.data : q.a_in.data;
  const Out* base = reinterpret_cast<const Out*>(first ? q.dw1.data : q.dw2.data);
  const int *token = q.d_token.data, *offsets = q.d_offsets.data;
  const bool skip = q.c.nan_neighbours, accumulate = q.c.accumulate;
  int64_t start[2], row_stride[2], expert_stride[2];
  for (size_t p = 0; p < planes; p++) {
    start[p] = first ? reinterpret_cast<const Out*>(q.dw1_view[p].base) - base : 0;
    row_stride[p] = first ? q.dw1_view[p].row_stride : q.s.n;
    expert_stride[p] = first ? q.dw1_view[p].expert_stride : q.s.n * q.s.d;
  }
  const int64_t s0 = start[0], s1 = start[planes - 1], rs = row_stride[0], es = expert_stride[0];
  const size_t total = E * planes * n * d, looked = samples ? std::min(samples, total) : total;
  const bool all = looked == total;
  for_each(looked, [=] __device__(size_t index) {
    const size_t i = all ? index : mix(index) % total;
    const size_t e = i / (planes * n * d), plane = i / (n * d) % planes, a = i / d % n, b = i % d;  // a of n, b of d
    if (skip && e % 2) return;
    const size_t at = (plane ? s1 : s0) + e * es + (first ? a * rs + b : b * rs + a);
    double want = accumulate ? double(float(Out(normal(at, 9)))) : 0.;
    for (int row = offsets[e]; row < offsets[e + 1]; row++)
      want += double(float(g[token[row] * d + b])) * double(float(c[(row * planes + plane) * n + a]));
    note(out, double(float(base[at])), want);
    if (offsets[e] == offsets[e + 1] && double(float(base[at])) != want) atomicAdd(&out->disturbed, 1ull);
  });
  guards(first ? q.dw1 : q.dw2, (first ? q.dw1 : q.dw2).size, out);
  verdict(q, first ? "dW1" : "dW2", sums.get(), std::is_same_v<Out, float> ? 1e-5 : 4e-3);
}
void verify_dw(Problem& q, Verdict& verdict, bool first, size_t samples) {
  if (q.c.out_dtype == DType::F32) verify_dw_as<float>(q, verdict, first, samples);
  else verify_dw_as<bf16>(q, verdict, first, samples);
}

const std::vector<int> kRagged = {0, 1, 127, 128, 129, 300, 64, 513};
const std::vector<int> kTails = {1, 15, 16, 17, 0, 32, 33, 47, 48, 49, 63, 64, 65, 80, 113, 129};  // last blocks of 1 to 4 steps of 16 rows

std::vector<Case> cases() {
  std::vector<Case> list;
  auto add = [&](Case c) {
    list.push_back(std::move(c));
    return &list.back();
  };
  for (auto [d, n] : {std::pair{320, 192}, {512, 256}, {64, 64}, {8, 8}, {72, 104}, {104, 72}, {8, 640}, {640, 8}, {768, 320}, {200, 584}})
    add({fmt::format("d {} n {}", d, n), 600, d, n, 8, kRagged});
  for (Layout layout : {Layout::Interleaved, Layout::TwoTensors})
    add({fmt::format("layout {}", static_cast<int>(layout)), 600, 320, 200, 8, kRagged})->layout = layout;
  for (int kind = 1; kind <= 8; kind++)
    add({fmt::format("activation {}", kind), 600, 192, 328, 8, kRagged})->act.kind = static_cast<ActivationKind>(kind);
  for (ActivationKind kind : {ActivationKind::SwiGLU, ActivationKind::SwiGLUOai})
    add({"clamped", 600, 128, 64, 8, kRagged})->act = {kind, 1.702f, 1.5f};
  for (DType type : {DType::F32, DType::BF16})
    for (bool accumulate : {false, true})
      for (Layout layout : {Layout::Concatenated, Layout::Interleaved}) {
        Case* c = add({fmt::format("{} {} layout {}", type == DType::F32 ? "fp32" : "bf16", accumulate ? "accumulated" : "overwritten",
                                   static_cast<int>(layout)),
                       600, 200, 328, 8, kRagged});
        c->out_dtype = type;
        c->accumulate = accumulate;
        c->layout = layout;
      }
  add({"rows", 0, 264, 136, 8, kRagged})->kind = RoutingKind::Rows;
  {
    Case* c = add({"rows, plain, NaN neighbours", 0, 264, 136, 8, kRagged});
    c->kind = RoutingKind::Rows;
    c->act.kind = ActivationKind::ReLU2;
    c->nan_neighbours = true;
  }
  for (auto [d, n] : {std::pair{320, 192}, {72, 104}, {512, 256}})
    add({fmt::format("NaN neighbours d {} n {}", d, n), 600, d, n, 8, {128, 1, 127, 129, 0, 64, 300, 513}})->nan_neighbours = true;
  {
    std::vector<int> counts(96);  // several tiles for every CTA: what an expert with NaN leaves in shared memory meets every tail
    for (size_t e = 0; e < counts.size(); e++) counts[e] = kTails[(e + e / 16) % 16];
    add({"NaN neighbours, tails", 600, 320, 320, 96, counts})->nan_neighbours = true;
    for (auto [d, n] : {std::pair{384, 704}, {448, 448}})  // wide and narrow tiles, warpgroups without columns
      for (bool accumulate : {false, true}) add({fmt::format("tails d {} n {}", d, n), 600, d, n, 96, counts})->accumulate = accumulate;
  }
  add({"tails, few columns", 600, 72, 136, 16, kTails});
  {
    Case* c = add({"tails, accumulated", 600, 320, 576, 16, kTails});
    c->accumulate = true;
  }
  {
    Case* c = add({"tails, fp32", 600, 320, 576, 16, kTails});
    c->out_dtype = DType::F32;
  }
  {
    Case* c = add({"output bias", 600, 200, 584, 8, kRagged});
    c->bias = true;
  }
  add({"one expert", 600, 256, 128, 1, {1000}});
  add({"no rows", 600, 256, 128, 4, {0, 0, 0, 0}});
  {
    Case* c = add({"no rows, accumulated", 600, 256, 128, 4, {0, 0, 0, 0}});
    c->accumulate = true;
    c->out_dtype = DType::F32;
  }
  add({"no capacity", 600, 256, 128, 4, {0, 0, 0, 0}})->spare = 0;
  std::vector<int> many(160);  // several tiles for every CTA, all phases of the rings
  for (int e = 0; e < 160; e++) many[e] = (e * 37) % 200;
  add({"many experts", 4000, 520, 392, 160, many})->spare = 0;
  // 18 turns of each of 66 clusters; two and three turns of each, and an item less or more: experts are items of dW, pairs of them those of the others
  add({"dH: many turns of one k block", 600, 64, 2048, 300, std::vector<int>(300, 3)});
  add({"dX~: many turns of one k block", 600, 2048, 64, 300, std::vector<int>(300, 3)})->act.kind = ActivationKind::ReLU2;
  for (const int experts : {131, 132, 133, 198, 199, 264, 266, 396, 398})
    add({fmt::format("{} experts of one row", experts), 600, 64, 64, experts, std::vector<int>(static_cast<size_t>(experts), 1)});
  for (size_t i = 0; i < list.size(); i += 2)  // half of the gathered cases by slots
    if (list[i].kind == RoutingKind::Lists) list[i].kind = RoutingKind::TopK, list[i].K = std::array{1, 2, 3, 6, 8, 10, 22}[i / 2 % 7];
  return list;
}

int check() {
  Verdict verdict;
  int count = 0;
  for (const Case& c : cases()) {
    printf("case %s\n", c.name.c_str());
    fflush(stdout);
    Problem q(c);
    std::vector<uint8_t> first[6];
    for (int run = 0; run < 2; run++) {
      for (auto* b : {&q.dh, &q.a_prime, &q.dx}) b->poison();
      q.ds.poison();
      for (auto* b : {&q.dw1, &q.dw2}) {
        b->poison();
        if (c.accumulate) q.start(*b);
      }
      cuda::hopper::down_proj_bwd(q.dh_args(run == 1), {});
      CHECK_CUDA(cudaDeviceSynchronize());
      cuda::hopper::up_proj_bwd(q.dx_args(), {});
      CHECK_CUDA(cudaDeviceSynchronize());
      cuda::hopper::weight_grad_w2(q.dw2_args(), {});
      CHECK_CUDA(cudaDeviceSynchronize());
      cuda::hopper::weight_grad_w1(q.dw1_args(), {});
      CHECK_CUDA(cudaDeviceSynchronize());
      if (q.turns.download()[0] != 0) {
        printf("  turns are not 0 after the kernels: FAIL\n");
        verdict.ok = false;
      }
      if (run == 0) {
        verify_dh(q, verdict, 0);
        verify_dx(q, verdict, 0);
        verify_dw(q, verdict, false, 0);
        verify_dw(q, verdict, true, 0);
      }
      auto bytes = [](const auto& b) {
        const auto v = b.download();
        const auto* p = reinterpret_cast<const uint8_t*>(v.data());
        return std::vector<uint8_t>(p, p + v.size() * sizeof v[0]);
      };
      const std::vector<uint8_t> now[6] = {bytes(q.dh), bytes(q.a_prime), bytes(q.ds), bytes(q.dx), bytes(q.dw1), bytes(q.dw2)};
      for (int i = 0; i < 6; i++) {
        if (run == 0) first[i] = now[i];
        else if (first[i] != now[i]) {
          printf("  output %d differs in the second run: FAIL\n", i);
          verdict.ok = false;
        }
      }
    }
    count++;
  }
  printf("%d cases: %s\n", count, verdict.ok ? "all ok" : "FAILED");
  return !verdict.ok;
}

struct PerfShape {
  const char* name;
  int64_t T, d, n, E, K;
};
constexpr PerfShape kShapes[] = {
    {"30B-n1024-K4", 32768, 4096, 1024, 64, 4},    {"30B-n512-K8", 32768, 4096, 512, 128, 8}, {"30B-n256-K16", 32768, 4096, 256, 256, 16},
    {"7B-n1024-K2", 24576, 1536, 1024, 32, 2},     {"7B-n512-K4", 24576, 1536, 512, 64, 4},   {"7B-n256-K8", 24576, 1536, 256, 128, 8},
    {"1.4B-n256-K8", 40960, 768, 256, 128, 8},     {"OLMoE-1B-7B", 32768, 2048, 1024, 64, 8}, {"Qwen3-30B-A3B", 32768, 2048, 768, 128, 8},
    {"Qwen3-Next-80B", 32768, 2048, 512, 512, 10}, {"gpt-oss-20b", 32768, 2880, 2880, 32, 4}, {"DeepSeek-V3", 16384, 7168, 2048, 256, 8}};

int perf(bool random, const char* only) {
  Verdict verdict;
  printf("%s routing; burst ms / TFLOP/s | soaked ms / TFLOP/s\n", random ? "random" : "balanced");
  for (const PerfShape& f : kShapes) {
    if (only && !strstr(f.name, only)) continue;
    std::vector<int> counts(f.E, static_cast<int>(f.T * f.K / f.E));
    if (random) {  // multinomial, as uniform routing gives
      std::mt19937 rng(3);
      std::fill(counts.begin(), counts.end(), 0);
      for (int64_t i = 0; i < f.T * f.K; i++) counts[rng() % f.E]++;
    }
    Case c{f.name, f.T, f.d, f.n, f.E, counts};
    c.spare = 0;
    Problem q(c);
    struct Kernel {
      const char* name;
      std::function<void()> run;
      double flop;
    };
    const double unit = 2.0 * static_cast<double>(q.R) * static_cast<double>(f.n) * static_cast<double>(f.d);
    const Kernel kernels[] = {{"dH", [&] { cuda::hopper::down_proj_bwd(q.dh_args(), {}); }, unit},
                              {"dX~", [&] { cuda::hopper::up_proj_bwd(q.dx_args(), {}); }, 2 * unit},
                              {"dW2", [&] { cuda::hopper::weight_grad_w2(q.dw2_args(), {}); }, unit},
                              {"dW1", [&] { cuda::hopper::weight_grad_w1(q.dw1_args(), {}); }, 2 * unit}};
    for (const Kernel& k : kernels) {
      k.run();
      CHECK_CUDA(cudaDeviceSynchronize());
    }
    verify_dh(q, verdict, 24);
    verify_dx(q, verdict, 24);
    verify_dw(q, verdict, false, 4000);
    verify_dw(q, verdict, true, 4000);
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    auto timed = [&](const Kernel& k, int times) {
      CHECK_CUDA(cudaEventRecord(begin));
      for (int i = 0; i < times; i++) k.run();
      CHECK_CUDA(cudaEventRecord(end));
      CHECK_CUDA(cudaEventSynchronize(end));
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
      return ms / static_cast<float>(times);
    };
    printf("%-15s", f.name);
    for (const Kernel& k : kernels) {
      CHECK_CUDA(cudaDeviceSynchronize());
      usleep(30000);
      k.run();
      const float burst = std::min(timed(k, 2), timed(k, 2));
      timed(k, std::max(2, static_cast<int>(100 / burst)));
      const float soaked = timed(k, std::max(2, static_cast<int>(60 / burst)));
      printf("  %s %.3f / %.0f | %.3f / %.0f", k.name, burst, k.flop / burst / 1e9, soaked, k.flop / soaked / 1e9);
    }
    printf("\n");
    fflush(stdout);
  }
  return !verdict.ok;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  try {
    if (mode == "check") return check();
    const bool random = argc > 2 && !strcmp(argv[2], "random");
    return perf(random, argc > 2 + random ? argv[2 + random] : nullptr);
  } catch (const std::exception& e) {
    printf("%s\n", e.what());
    return 2;
  }
}
