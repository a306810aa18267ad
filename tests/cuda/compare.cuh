// What a kernel wrote against its reference: sums over the elements, taken on the device, and the bits of a second run.
#pragma once
#include "problem.cuh"

namespace machmoe::test {

struct Sums {
  double error, reference;            // of squares
  unsigned long long nan, disturbed;  // disturbed: elements that must have kept their value
};
inline Buffer<Sums> no_sums() { return Buffer<Sums>(std::vector<Sums>(1)); }

__device__ inline void note(Sums* out, double have, double want) {
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
// What is expected as it was poisoned: some elements; those of a buffer from `first` on, with its guards.
template <class T>
void untouched(const T* begin, const T* end, Sums* out) {
  for_each(end - begin, [=] __device__(size_t i) {
    if (!poisoned(begin + i)) atomicAdd(&out->disturbed, 1ull);
  });
}
template <class T>
void untouched(const Buffer<T>& b, size_t first, Sums* out) {
  untouched<T>(b.guard_begin(), b.data(), out);
  untouched<T>(b.data() + first, b.guard_end(), out);
}

// Element (e, row, col) of a weight or bias is p[e expert + row row + col].
struct View {
  const bf16* p;
  int64_t row, expert;
};
inline View view(const ConstWeight& w) { return {static_cast<const bf16*>(w.base), w.row_stride, w.expert_stride}; }
inline View view(const ConstBias& b) { return {static_cast<const bf16*>(b.base), b.stride, b.expert_stride}; }

// The large shapes of perf also say what is good.
inline void judge(Verdict& verdict, const Case& c, const char* what, const Buffer<Sums>& sums, double bound) {
  const Sums v = sums.download()[0];
  const double e = std::sqrt(v.reference > 0 ? v.error / v.reference : v.error);
  const bool good = e <= bound && v.nan == 0 && v.disturbed == 0;
  const std::string line = fmt::format("{:44} {:5} {:.2e} nan {} disturbed {}", c.name, what, e, v.nan, v.disturbed);
  verdict(good, line);
  if (good && c.T > 10000) printf("  ok   %s\n", line.c_str());
  fflush(stdout);
}

// Twice run(again) on poisoned outputs: the same bits, and turns at 0.
template <class Run, class... Outputs>
void run_twice(Verdict& verdict, const Problem& q, const Run& run, Outputs&... outputs) {
  std::vector<std::vector<uint8_t>> first;
  for (const bool again : {false, true}) {
    (outputs.poison(), ...);
    run(again);
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    std::vector<std::vector<uint8_t>> now = {outputs.template download<uint8_t>()...};
    for (size_t i = 0; again && i < now.size(); i++)
      if (now[i] != first[i]) verdict.fail(fmt::format("{}: output {} differs in the second run", q.c.name, i));
    if (q.turns.download()[0] != 0) verdict.fail(q.c.name + ": turns are not 0 after the kernels");
    first = std::move(now);
  }
}

}  // namespace machmoe::test
