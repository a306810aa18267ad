// The two forward GEMMs of the CUDA backend against fp64 references written from their definitions, and their times. Runs on a GPU, by hand:
//   forward_driver check                            every case below: poisoned outputs, guard rows, NaN in neighbouring experts, bit-equal second run
//   forward_driver perf [balanced|random] [shapes]  milliseconds and TFLOP/s at the shapes of the published comparisons; sampled values are checked
#include <dlfcn.h>

#include <cstring>

#include "compare.cuh"
#include "core/activation.h"
#include "cuda/kernels.h"

using namespace machmoe;
using namespace machmoe::test;

namespace {

struct Forward : Problem {
  using Problem::Problem;
  Buffer<bf16> b1 = of_experts(planes * s.n, 5, 0.5f), a_in = of_rows(s.n, 6);
  Buffer<bf16> h = empty_rows(planes * s.n), a = empty_rows(s.n), y = empty_rows(s.d);

  ConstBias b1_plane(int64_t p) const {
    const auto [first, stride, per_expert] = plane(p);
    return {c.bias ? b1.data() + first : nullptr, stride, per_expert};
  }
  ConstBias b1_gate() const { return planes == 2 ? b1_plane(0) : ConstBias{}; }
  ConstBias b1_up() const { return b1_plane(planes - 1); }
  UpProjArgs up_args() const {
    bf16 *to_h = c.store_h ? h.data() : nullptr, *to_a = c.store_a ? a.data() : nullptr;
    return {s, r, x.data(), w1_gate(), w1_up(), b1_gate(), b1_up(), to_h, to_a, turns.data()};
  }
  DownProjArgs down_args() const { return {s, r, a_in.data(), w2_view(), b2_view(), y.data(), turns.data()}; }
};

// samples = 0: every element. Odd experts are not looked at when they carry NaN.
template <ActivationKind K>
void verify_up_as(const Forward& q, Verdict& verdict, size_t samples) {
  constexpr bool kGated = Activation{K}.gated();
  const Buffer<Sums> sums_h = no_sums(), sums_a = no_sums();
  Sums *ph = sums_h.data(), *pa = sums_a.data();
  const size_t d = q.s.d, n = q.s.n, R = q.R, planes = q.planes, total = R * n, looked = samples ? std::min(samples, total) : total;
  const bf16 *x = q.x.data(), *h = q.h.data(), *a = q.a.data();
  const int *token = q.token.data(), *expert = q.expert.data();
  const bool skip = q.c.nan_neighbours, bias = q.c.bias, store_h = q.c.store_h, store_a = q.c.store_a, all = looked == total;
  const View w0 = view(q.w1_plane(0)), w1 = view(q.w1_up()), b0 = view(q.b1_plane(0)), b1 = view(q.b1_up());
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
  untouched(q.h, store_h ? R * planes * n : 0, ph);
  untouched(q.a, store_a ? R * n : 0, pa);
  judge(verdict, q.c, "H", sums_h, 2.5e-3);
  judge(verdict, q.c, "A", sums_a, 4e-3);  // of H in bf16
}
void verify_up(const Forward& q, Verdict& verdict, size_t samples) {
  dispatch_activation(q.s.act.kind, [&](auto tag) { verify_up_as<decltype(tag)::kind>(q, verdict, samples); });
}
void verify_down(const Forward& q, Verdict& verdict, size_t samples) {
  const Buffer<Sums> sums = no_sums();
  Sums* out = sums.data();
  const size_t d = q.s.d, n = q.s.n, R = q.R, total = R * d, looked = samples ? std::min(samples, total) : total;
  const bf16 *a = q.a_in.data(), *y = q.y.data();
  const int* expert = q.expert.data();
  const float* score = q.score.data();
  const bool rows = q.c.kind == RoutingKind::Rows, skip = q.c.nan_neighbours, bias = q.c.bias && rows, scores = q.c.scores && rows,
             all = looked == total;
  const View w = view(q.w2_view()), b = view(q.b2_view());
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
  untouched(q.y, rows ? q.s.R_cap * d : R * d, out);
  judge(verdict, q.c, "Y", sums, 2.5e-3);
}

std::vector<Case> cases() {
  std::vector<Case> list;
  const auto add = [&](Case c) -> Case& { return list.emplace_back(std::move(c)); };
  const std::vector<int> ragged = {0, 1, 127, 128, 129, 300, 64, 513, 0};
  constexpr const char* kLayouts[] = {"concatenated", "interleaved", "two tensors"};
  for (const Layout layout : {Layout::Concatenated, Layout::Interleaved, Layout::TwoTensors})
    for (const auto& [d, n] : {std::pair{320, 192}, {64, 256}, {512, 64}, {8, 8}, {72, 104}, {104, 72}, {200, 328}, {392, 96}})
      add({fmt::format("ragged d={} n={} {}", d, n, kLayouts[int(layout)]), 600, d, n, ragged}).layout = layout;
  constexpr const char* kActivations[] = {"swiglu", "swiglu_oai", "geglu", "reglu", "relu2", "relu", "gelu", "gelu_erf", "silu"};
  for (int k = 0; k <= 8; k++)
    for (const bool bias : {false, true}) {
      Case& c = add({fmt::format("{}{}", kActivations[k], bias ? " bias" : ""), 600, 136, 200, ragged});
      c.act.kind = ActivationKind(k);
      c.layout = k % 2 ? Layout::Interleaved : Layout::Concatenated;
      c.bias = bias;
    }
  add({"swiglu limit", 600, 136, 200, ragged}).act = {ActivationKind::SwiGLU, 1.f, 0.7f};
  Case& clamped = add({"swiglu_oai limit bias", 600, 136, 200, ragged});
  clamped.act = {ActivationKind::SwiGLUOai, 1.702f, 0.7f};
  clamped.layout = Layout::Interleaved;
  clamped.bias = true;
  for (const int n : {192, 256}) {
    add({fmt::format("A alone n={}", n), 600, 320, n, ragged}).store_h = false;
    add({fmt::format("H alone n={}", n), 600, 320, n, ragged}).store_a = false;
    for (const bool bias : {false, true})
      for (const bool scores : {false, true}) {
        Case& c = add({fmt::format("rows n={}{}{}", n, bias ? " bias" : "", scores ? " scores" : ""), 600, 264, n, ragged, RoutingKind::Rows});
        c.bias = bias;
        c.scores = scores;
        c.spare = 300;
      }
    for (const RoutingKind kind : {RoutingKind::Lists, RoutingKind::Rows})
      add({fmt::format("NaN in odd experts n={}", n), 600, 328, n, ragged, kind}).nan_neighbours = true;
  }
  add({"one expert", 600, 320, 256, {777}});
  add({"one row", 600, 320, 256, {0, 0, 1}});
  add({"no rows", 600, 320, 256, {0, 0, 0}});
  add({"no rows, dispatched", 600, 320, 256, {0, 0}, RoutingKind::Rows});
  add({"many small experts", 600, 128, 128, std::vector<int>(300, 3)});
  // 18 turns of each of 66 clusters; items of two and of three turns of each, and one more
  add({"A: many turns of one k block", 600, 64, 1024, std::vector<int>(300, 3)});
  add({"Y: many turns of one k block", 600, 2048, 64, std::vector<int>(300, 3)});
  for (const int experts : {264, 266, 396, 398})
    add({fmt::format("{} items", experts / 2), 600, 64, 64, std::vector<int>(static_cast<size_t>(experts), 1)});
  std::mt19937 rng(3);
  for (int i = 0; i < 12; i++) {
    std::vector<int> counts(1 + rng() % 40);
    for (int& f : counts) f = rng() % 3 ? int(rng() % 700) : 0;
    const int d = 8 * (1 + int(rng() % 120)), n = 8 * (1 + int(rng() % 70));
    add({fmt::format("random {} d={} n={} E={}", i, d, n, counts.size()), 900, d, n, counts, i % 3 ? RoutingKind::Lists : RoutingKind::Rows});
  }
  half_by_slots(list);
  return list;
}

bool check() {
  Verdict verdict;
  const std::vector<Case> list = cases();
  for (const Case& c : list) {
    Forward q(c);
    const auto run = [&](bool) {
      cuda::hopper::up_proj(q.up_args(), {});
      cuda::hopper::down_proj(q.down_args(), {});
    };
    run_twice(verdict, q, run, q.h, q.a, q.y);
    verify_up(q, verdict, 0);
    verify_down(q, verdict, 0);
  }
  printf("check: %zu cases, %d values, %s\n", list.size(), verdict.checks(), verdict.ok() ? "ALL OK" : "FAILED");
  return verdict.ok();
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
  for (const Case& c : published_cases(random)) {
    if (only && !strstr(only, c.name.c_str())) continue;
    const Forward q(c);
    const UpProjArgs up = q.up_args();
    const DownProjArgs down = q.down_args();
    cuda::hopper::up_proj(up, {});
    cuda::hopper::down_proj(down, {});
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    verify_up(q, verdict, 20000);
    verify_down(q, verdict, 20000);
    const double flop = 2. * q.R * c.n * c.d / 1e9;
    printf("%-16s", c.name.c_str());
    const auto report = [](double gflop, const auto& run) {
      const Milliseconds t = milliseconds(run);
      printf(" | %.4f %4.0f %.4f %4.0f", t.burst, gflop / t.burst, t.soaked, gflop / t.soaked);
    };
    const bool dense = blas.gemm && !random;
    const int64_t rows = q.R / q.s.E;
    Buffer<bf16> gathered(dense ? q.R * c.d : 0);
    if (dense) fill(gathered.data(), gathered.size(), 8);
    report(2 * flop, [&] { cuda::hopper::up_proj(up, {}); });
    if (dense) report(2 * flop, [&] { blas(rows, 2 * c.n, c.d, gathered.data(), q.w1.data(), q.h.data(), q.s.E); });
    report(flop, [&] { cuda::hopper::down_proj(down, {}); });
    if (dense) report(flop, [&] { blas(rows, c.d, c.n, q.a_in.data(), q.w2.data(), q.y.data(), q.s.E); });
    printf("\n");
    fflush(stdout);
  }
  return verdict.ok();
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
