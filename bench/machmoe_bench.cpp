// machmoe-bench: forward and backward of one experts layer on the CPU, from the indices on. Minimum and median times, GFLOP/s.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <vector>

#include "machmoe/machmoe.hpp"

namespace {

struct Options {
  int64_t T = 4096, d = 512, n = 256, E = 32, K = 4;
  std::string dtype = "f32";
  int threads = 0, repeats = 9;
  std::string json;
};

// A tensor of normal values in the layer's type.
std::vector<uint8_t> normal(int64_t count, double deviation, bool bf16, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution(0.f, static_cast<float>(deviation));
  std::vector<uint8_t> bytes(static_cast<size_t>(count) * (bf16 ? 2 : 4));
  for (int64_t i = 0; i < count; i++) {
    const float v = distribution(engine);
    const auto* from = reinterpret_cast<const uint8_t*>(&v);
    if (bf16) std::copy(from + 2, from + 4, bytes.data() + 2 * i);
    else std::copy(from, from + 4, bytes.data() + 4 * i);
  }
  return bytes;
}

struct Times {
  double min, median;  // ms
};
template <class F>
Times measure(int repeats, F&& f) {
  f();  // page faults and oneDNN's primitives
  std::vector<double> ms;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    f();
    ms.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(ms.begin(), ms.end());
  return {ms.front(), ms[ms.size() / 2]};
}

void run(const Options& o) {
  const bool bf16 = o.dtype == "bf16";
  machmoe_set_num_threads(o.threads);
  const machmoe_dtype dtype = bf16 ? MACHMOE_BF16 : MACHMOE_F32;
  const machmoe::Layer layer({.dtype = dtype, .T = o.T, .d = o.d, .n = o.n, .E = o.E, .K = o.K});
  const int64_t nd = o.n * o.d;
  auto x = normal(o.T * o.d, 1, bf16, 1), w1 = normal(o.E * 2 * nd, 1 / std::sqrt(double(o.d)), bf16, 2),
       w2 = normal(o.E * nd, 1 / std::sqrt(double(o.n)), bf16, 3), d_o = normal(o.T * o.d, 1, bf16, 4), out = x, dx = x, dw1 = w1, dw2 = w2;
  std::mt19937 engine(5);
  std::vector<int32_t> ids, experts(static_cast<size_t>(o.E));
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t t = 0; t < o.T; t++) {
    std::shuffle(experts.begin(), experts.end(), engine);
    ids.insert(ids.end(), experts.begin(), experts.begin() + o.K);
  }
  const std::vector<float> scores(ids.size(), 1.f / static_cast<float>(o.K));
  std::vector<float> dscore(ids.size());
  const machmoe_weights weights = machmoe::concatenated(layer, w1.data(), w2.data());

  machmoe::Routing routing;
  machmoe::Saved saved;
  const Times forward = measure(o.repeats, [&] {
    routing = layer.route_topk(ids.data(), scores.data());
    saved = layer.forward(routing, weights, x.data(), out.data());
  });
  const Times backward = measure(o.repeats, [&] {
    layer.backward(routing, weights, saved, x.data(), d_o.data(),
                   {.dx = dx.data(), .dscore = dscore.data(), .weights = machmoe::concatenated(layer, dw1.data(), dw2.data())});
  });
  const double flops = 6.0 * double(o.T * o.K) * double(nd);
  fmt::print("{}\n{} {} threads  T {} d {} n {} E {} K {}\n", machmoe_build_info(), o.dtype, machmoe_get_num_threads(), o.T, o.d, o.n, o.E, o.K);
  nlohmann::json record = {{"dtype", o.dtype}, {"threads", machmoe_get_num_threads()}, {"T", o.T}, {"d", o.d}, {"n", o.n}, {"E", o.E}, {"K", o.K}};
  const auto line = [&](const char* name, Times t, double work) {
    fmt::print("{:<9} min {:8.2f} ms  median {:8.2f} ms  {:7.1f} GFLOP/s\n", name, t.min, t.median, work / t.min * 1e-6);
    record[name] = {{"min_ms", t.min}, {"median_ms", t.median}, {"gflops", work / t.min * 1e-6}};
  };
  line("forward", forward, flops);
  line("backward", backward, 2 * flops);
  line("together", {forward.min + backward.min, forward.median + backward.median}, 3 * flops);
  if (!o.json.empty()) std::ofstream(o.json) << record.dump(2) << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Times one experts layer of machmoe's CPU backend, forward and backward, from the indices on.");
  app.add_option("-T,--tokens", o.T, "tokens")->capture_default_str();
  app.add_option("-d,--hidden", o.d, "hidden size")->capture_default_str();
  app.add_option("-n,--intermediate", o.n, "intermediate size of one expert")->capture_default_str();
  app.add_option("-E,--experts", o.E, "experts")->capture_default_str();
  app.add_option("-K,--topk", o.K, "experts per token")->capture_default_str();
  app.add_option("--dtype", o.dtype, "element type")->check(CLI::IsMember({"f32", "bf16"}))->capture_default_str();
  app.add_option("--threads", o.threads, "threads, 0 = all cores")->capture_default_str();
  app.add_option("--repeats", o.repeats, "timed calls")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--json", o.json, "also write the result to this file");
  CLI11_PARSE(app, argc, argv);
  try {
    run(o);
  } catch (const machmoe::Error& e) {
    fmt::print(stderr, "machmoe-bench: {}\n", e.what());
    return 2;
  }
}
