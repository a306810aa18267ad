// The four backward GEMMs of the CUDA backend against fp64 references written from their definitions, and their times. Runs on a GPU, by hand:
//   backward_driver check                  every case below: poisoned outputs, guard rows, NaN in neighbouring experts, bit-equal second run with
//                                          dH over H
//   backward_driver perf [random] [shape]  milliseconds and TFLOP/s at the shapes of the published comparisons; sampled values are checked
#include <cstring>

#include "compare.cuh"
#include "core/activation.h"
#include "cuda/kernels.h"

using namespace machmoe;
using namespace machmoe::test;

namespace {

// dH, A' and dX~ begin at the edge of their memory: their maps start ahead of them.
struct Backward : Problem {
  using Problem::Problem;
  int64_t wide = planes * s.n, parts = cuda::hopper::ds_parts(s);
  Buffer<bf16> d_o = of_tokens(5), h = of_rows(wide, 6, 1.5f), dh_in = of_rows(wide, 7, 1, true), a_in = of_rows(s.n, 8, 1, true);
  Buffer<bf16> dh = empty_rows(wide, true), a_prime = empty_rows(s.n, true), dx = empty_rows(s.d, true);
  Buffer<float> ds = Buffer<float>(parts * s.R_cap);
  DeviceMemory dw1 = DeviceMemory(s.E * wide * s.d * size_of(c.out_dtype)), dw2 = DeviceMemory(s.E * s.n * s.d * size_of(c.out_dtype));

  // What an accumulator holds before the run: element i is normal(i, 9), rounded to the type.
  void start(const DeviceMemory& dw) const {
    if (c.out_dtype == DType::F32) fill(dw.data<float>(), dw.size() / sizeof(float), 9);
    else fill(dw.data<bf16>(), dw.size() / sizeof(bf16), 9);
  }
  MutableWeight dw1_plane(int64_t p) const {
    const auto [first, stride, per_expert] = plane(p);
    return {dw1.data() + first * s.d * size_of(c.out_dtype), stride * s.d, per_expert * s.d};
  }
  MutableWeight dw2_view() const { return {dw2.data(), s.n, s.n * s.d}; }
  WeightGradW2Args dw2_args() const { return {s, r, d_o.data(), a_in.data(), dw2_view(), c.out_dtype, c.accumulate, turns.data()}; }
  WeightGradW1Args dw1_args() const {
    const MutableWeight gate = planes == 2 ? dw1_plane(0) : MutableWeight{}, up = dw1_plane(planes - 1);
    return {s, r, x.data(), dh_in.data(), gate, up, c.out_dtype, c.accumulate, turns.data()};
  }
  DownProjBwdArgs dh_args(bool over_h = false) const {
    const bf16* from = over_h ? dh.data() : h.data();
    if (over_h) MACHMOE_CUDA_CALL(cudaMemcpy(dh.data(), h.data(), R * wide * sizeof(bf16), cudaMemcpyDeviceToDevice));
    return {s, r, d_o.data(), w2_view(), b2_view(), from, dh.data(), a_prime.data(), ds.data(), turns.data()};
  }
  UpProjBwdArgs dx_args() const { return {s, r, dh_in.data(), w1_gate(), w1_up(), dx.data(), turns.data()}; }
};

// samples = 0: every row. Odd experts are not looked at when they carry NaN.
template <ActivationKind K>
void verify_dh_as(const Backward& q, Verdict& verdict, size_t samples) {
  const Buffer<Sums> dh = no_sums(), a = no_sums(), ds = no_sums();
  Sums *p_dh = dh.data(), *p_a = a.data(), *p_ds = ds.data();
  const size_t d = q.s.d, n = q.s.n, R = q.R, cap = q.s.R_cap, planes = q.planes, parts = q.parts;
  const bf16 *d_o = q.d_o.data(), *w2 = q.w2.data(), *h = q.h.data(), *out_h = q.dh.data(), *out_a = q.a_prime.data(),
             *b2 = q.c.bias ? q.b2.data() : nullptr;
  const float *score = q.score.data(), *out_ds = q.ds.data(), alpha = q.s.act.alpha, limit = q.s.act.limit;
  const int *token = q.token.data(), *expert = q.expert.data();
  const bool skip = q.c.nan_neighbours;
  const Buffer<double> dot(std::vector<double>(R, 0));
  double* p_dot = dot.data();
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
  untouched(q.dh, R * planes * n, p_dh);
  untouched(q.a_prime, R * n, p_a);
  for (size_t part = 0; part < parts; part++) untouched(out_ds + part * cap + R, out_ds + (part + 1) * cap, p_ds);
  untouched(q.ds, parts * cap, p_ds);
  judge(verdict, q.c, "dH", dh, 4e-3);
  judge(verdict, q.c, "A'", a, 4e-3);
  judge(verdict, q.c, "dS", ds, 4e-3);  // of dA' in bf16
}
void verify_dh(const Backward& q, Verdict& verdict, size_t samples) {
  dispatch_activation(q.s.act.kind, [&](auto tag) { verify_dh_as<decltype(tag)::kind>(q, verdict, samples); });
}

void verify_dx(const Backward& q, Verdict& verdict, size_t samples) {
  const Buffer<Sums> sums = no_sums();
  Sums* out = sums.data();
  const size_t d = q.s.d, n = q.s.n, R = q.R, cap = q.s.R_cap, planes = q.planes;
  const bf16 *dh = q.dh_in.data(), *dx = q.dx.data();
  const int* expert = q.expert.data();
  const bool skip = q.c.nan_neighbours;
  const View w0 = view(q.w1_plane(0)), w1 = view(q.w1_up());
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
  const bool dispatched = q.s.kind == RoutingKind::Rows;
  if (dispatched)
    for_each((cap - R) * d, [=] __device__(size_t i) {
      if (float(dx[R * d + i]) != 0.f) atomicAdd(&out->disturbed, 1ull);
    });
  untouched(q.dx, (dispatched ? cap : R) * d, out);
  judge(verdict, q.c, "dX~", sums, 4e-3);
}

template <class Out>
void verify_dw_as(const Backward& q, Verdict& verdict, bool first, size_t samples) {
  const Buffer<Sums> sums = no_sums();
  Sums* out = sums.data();
  const size_t d = q.s.d, n = q.s.n, E = q.s.E, planes = first ? q.planes : 1;
  const DeviceMemory& dw = first ? q.dw1 : q.dw2;
  const bf16 *g = first ? q.x.data() : q.d_o.data(), *c = first ? q.dh_in.data() : q.a_in.data();
  const Out* base = dw.data<Out>();
  const int *token = q.token.data(), *offsets = q.offsets.data();
  const bool skip = q.c.nan_neighbours, accumulate = q.c.accumulate;
  const MutableWeight w0 = first ? q.dw1_plane(0) : q.dw2_view(), w1 = first ? q.dw1_plane(planes - 1) : w0;
  const int64_t s0 = static_cast<const Out*>(w0.base) - base, s1 = static_cast<const Out*>(w1.base) - base, rs = w0.row_stride, es = w0.expert_stride;
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
  untouched(dw, dw.size(), out);
  judge(verdict, q.c, first ? "dW1" : "dW2", sums, std::is_same_v<Out, float> ? 1e-5 : 4e-3);
}
void verify_dw(const Backward& q, Verdict& verdict, bool first, size_t samples) {
  if (q.c.out_dtype == DType::F32) verify_dw_as<float>(q, verdict, first, samples);
  else verify_dw_as<bf16>(q, verdict, first, samples);
}

const std::vector<int> kRagged = {0, 1, 127, 128, 129, 300, 64, 513};
const std::vector<int> kTails = {1, 15, 16, 17, 0, 32, 33, 47, 48, 49, 63, 64, 65, 80, 113, 129};  // last blocks of 1 to 4 steps of 16 rows

std::vector<Case> cases() {
  std::vector<Case> list;
  const auto add = [&](Case c) -> Case& { return list.emplace_back(std::move(c)); };
  for (auto [d, n] : {std::pair{320, 192}, {512, 256}, {64, 64}, {8, 8}, {72, 104}, {104, 72}, {8, 640}, {640, 8}, {768, 320}, {200, 584}})
    add({fmt::format("d {} n {}", d, n), 600, d, n, kRagged});
  for (Layout layout : {Layout::Interleaved, Layout::TwoTensors})
    add({fmt::format("layout {}", static_cast<int>(layout)), 600, 320, 200, kRagged}).layout = layout;
  for (int kind = 1; kind <= 8; kind++)
    add({fmt::format("activation {}", kind), 600, 192, 328, kRagged}).act.kind = static_cast<ActivationKind>(kind);
  for (ActivationKind kind : {ActivationKind::SwiGLU, ActivationKind::SwiGLUOai}) add({"clamped", 600, 128, 64, kRagged}).act = {kind, 1.702f, 1.5f};
  for (DType type : {DType::F32, DType::BF16})
    for (bool accumulate : {false, true})
      for (Layout layout : {Layout::Concatenated, Layout::Interleaved}) {
        const char *to = type == DType::F32 ? "fp32" : "bf16", *how = accumulate ? "accumulated" : "overwritten";
        Case& c = add({fmt::format("{} {} layout {}", to, how, static_cast<int>(layout)), 600, 200, 328, kRagged});
        c.out_dtype = type;
        c.accumulate = accumulate;
        c.layout = layout;
      }
  add({"rows", 0, 264, 136, kRagged, RoutingKind::Rows});
  add({"rows, plain, NaN neighbours", 0, 264, 136, kRagged, RoutingKind::Rows, {ActivationKind::ReLU2}}).nan_neighbours = true;
  for (auto [d, n] : {std::pair{320, 192}, {72, 104}, {512, 256}})
    add({fmt::format("NaN neighbours d {} n {}", d, n), 600, d, n, {128, 1, 127, 129, 0, 64, 300, 513}}).nan_neighbours = true;
  std::vector<int> mixed(96);  // several tiles for every CTA: what an expert with NaN leaves in shared memory meets every tail
  for (size_t e = 0; e < mixed.size(); e++) mixed[e] = kTails[(e + e / 16) % 16];
  add({"NaN neighbours, tails", 600, 320, 320, mixed}).nan_neighbours = true;
  for (auto [d, n] : {std::pair{384, 704}, {448, 448}})  // wide and narrow tiles, warpgroups without columns
    for (bool accumulate : {false, true}) add({fmt::format("tails d {} n {}", d, n), 600, d, n, mixed}).accumulate = accumulate;
  add({"tails, few columns", 600, 72, 136, kTails});
  add({"tails, accumulated", 600, 320, 576, kTails}).accumulate = true;
  add({"tails, fp32", 600, 320, 576, kTails}).out_dtype = DType::F32;
  add({"output bias", 600, 200, 584, kRagged}).bias = true;
  add({"one expert", 600, 256, 128, {1000}});
  add({"no rows", 600, 256, 128, {0, 0, 0, 0}});
  Case& kept = add({"no rows, accumulated", 600, 256, 128, {0, 0, 0, 0}});
  kept.accumulate = true;
  kept.out_dtype = DType::F32;
  add({"no capacity", 600, 256, 128, {0, 0, 0, 0}}).spare = 0;
  std::vector<int> many(160);  // several tiles for every CTA, all phases of the rings
  for (int e = 0; e < 160; e++) many[e] = (e * 37) % 200;
  add({"many experts", 4000, 520, 392, many}).spare = 0;
  // 18 turns of each of 66 clusters; two and three turns of each, an item less or more: experts are items of dW, pairs of them those of the others
  add({"dH: many turns of one k block", 600, 64, 2048, std::vector<int>(300, 3)});
  add({"dX~: many turns of one k block", 600, 2048, 64, std::vector<int>(300, 3)}).act.kind = ActivationKind::ReLU2;
  for (const int experts : {131, 132, 133, 198, 199, 264, 266, 396, 398})
    add({fmt::format("{} experts of one row", experts), 600, 64, 64, std::vector<int>(static_cast<size_t>(experts), 1)});
  half_by_slots(list);
  return list;
}

int check() {
  Verdict verdict;
  const std::vector<Case> list = cases();
  for (const Case& c : list) {
    printf("case %s\n", c.name.c_str());
    fflush(stdout);
    Backward q(c);
    const auto run = [&](bool again) {
      if (c.accumulate) q.start(q.dw1), q.start(q.dw2);
      cuda::hopper::down_proj_bwd(q.dh_args(again), {});
      MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
      cuda::hopper::up_proj_bwd(q.dx_args(), {});
      MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
      cuda::hopper::weight_grad_w2(q.dw2_args(), {});
      MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
      cuda::hopper::weight_grad_w1(q.dw1_args(), {});
    };
    run_twice(verdict, q, run, q.dh, q.a_prime, q.ds, q.dx, q.dw1, q.dw2);
    verify_dh(q, verdict, 0);
    verify_dx(q, verdict, 0);
    verify_dw(q, verdict, false, 0);
    verify_dw(q, verdict, true, 0);
  }
  printf("%zu cases: %s\n", list.size(), verdict.ok() ? "all ok" : "FAILED");
  return !verdict.ok();
}

int perf(bool random, const char* only) {
  Verdict verdict;
  printf("%s routing; burst ms / TFLOP/s | soaked ms / TFLOP/s\n", random ? "random" : "balanced");
  for (const Case& c : published_cases(random)) {
    if (only && !strstr(c.name.c_str(), only)) continue;
    const Backward q(c);
    struct Kernel {
      const char* name;
      std::function<void()> run;
      double flop;
    };
    const double unit = 2. * q.R * c.n * c.d / 1e9;
    const Kernel kernels[] = {{"dH", [&] { cuda::hopper::down_proj_bwd(q.dh_args(), {}); }, unit},
                              {"dX~", [&] { cuda::hopper::up_proj_bwd(q.dx_args(), {}); }, 2 * unit},
                              {"dW2", [&] { cuda::hopper::weight_grad_w2(q.dw2_args(), {}); }, unit},
                              {"dW1", [&] { cuda::hopper::weight_grad_w1(q.dw1_args(), {}); }, 2 * unit}};
    for (const Kernel& k : kernels) {
      k.run();
      MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    }
    verify_dh(q, verdict, 24);
    verify_dx(q, verdict, 24);
    verify_dw(q, verdict, false, 4000);
    verify_dw(q, verdict, true, 4000);
    printf("%-15s", c.name.c_str());
    for (const Kernel& k : kernels) {
      const Milliseconds t = milliseconds(k.run);
      printf("  %s %.3f / %.0f | %.3f / %.0f", k.name, t.burst, k.flop / t.burst, t.soaked, k.flop / t.soaked);
    }
    printf("\n");
    fflush(stdout);
  }
  return !verdict.ok();
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
