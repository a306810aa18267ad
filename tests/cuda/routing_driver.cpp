// Router, metadata and token rounding of the CUDA backend against the CPU backend, and their times. Runs on a GPU, by hand:
//   routing_driver check [small]   bit-equal routings, router within rounding; poisoned outputs, guards, second runs
//   routing_driver perf            microseconds at the shapes of the published comparisons
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>

#include "core/float16.h"
#include "cpu/router.h"
#include "cpu/routing.h"
#include "cpu/token_rounding.h"
#include "cuda/kernels.h"
#include "cuda/work.h"
#include "device.h"

namespace machmoe::test {
namespace {

// A routing on the host, or downloaded from the device. order: of rows, the slots of top-K or positions in the lists.
struct Arrays {
  std::vector<int32_t> token, expert, counts, offsets, token_offsets, inverse, order;
  std::vector<float> score;
  bool operator==(const Arrays&) const = default;

  explicit Arrays(const Shape& s)
      : token(s.R_cap, -7),
        expert(s.R_cap, -7),
        counts(s.E, -7),
        offsets(s.E + 1, -7),
        token_offsets(s.T + 1, -7),
        inverse(s.R_cap, -7),
        order(s.R_cap, -7),
        score(s.R_cap, NAN) {}
  Routing views() {
    return {order.data(), token.data(), expert.data(), score.data(), counts.data(), offsets.data(), token_offsets.data(), inverse.data(), nullptr};
  }
  std::string difference(const Arrays& other, const Shape& s) const {
    if (counts != other.counts) return "counts";
    if (offsets != other.offsets) return "offsets";
    if (s.kind == RoutingKind::Rows) return "";
    if (expert != other.expert) return "expert";
    if (order != other.order) return "order";
    if (inverse != other.inverse) return "inverse";
    if (s.kind == RoutingKind::TopK) return "";
    if (token != other.token) return "token";
    if (token_offsets != other.token_offsets) return "token_offsets";
    if (score != other.score) return "score";
    return "";
  }
};

struct DeviceRouting {
  Shape s;
  DeviceMemory token, expert, score, counts, offsets, token_offsets, inverse, order, tiles;
  explicit DeviceRouting(const Shape& shape)
      : s(shape),
        token(4 * s.R_cap),
        expert(4 * s.R_cap),
        score(4 * s.R_cap),
        counts(4 * s.E),
        offsets(4 * (s.E + 1)),
        token_offsets(4 * (s.T + 1)),
        inverse(4 * s.R_cap),
        order(4 * s.R_cap),
        tiles(cuda::work_bytes(s.R_cap, s.E)) {}
  Routing views() const {
    return {s.kind == RoutingKind::TopK ? order.data<int32_t>() : nullptr,
            token.data<int32_t>(),
            expert.data<int32_t>(),
            score.data(),
            counts.data<int32_t>(),
            offsets.data<int32_t>(),
            token_offsets.data<int32_t>(),
            inverse.data<int32_t>(),
            tiles.data<int32_t>()};
  }
  Arrays get() const {
    Arrays a(s);
    a.token = token.download<int32_t>(), a.expert = expert.download<int32_t>(), a.counts = counts.download<int32_t>(),
    a.offsets = offsets.download<int32_t>();
    a.token_offsets = token_offsets.download<int32_t>(), a.inverse = inverse.download<int32_t>(), a.order = order.download<int32_t>();
    a.score = score.download<float>();
    return a;
  }
  bool guards_hold() const {
    return token.guards_hold() && expert.guards_hold() && score.guards_hold() && counts.guards_hold() && offsets.guards_hold() &&
           token_offsets.guards_hold() && inverse.guards_hold() && order.guards_hold() && tiles.guards_hold();
  }
  // The work lists against what the offsets say.
  bool work_list_holds(const std::vector<int32_t>& offset) const {
    std::vector<int32_t> words = tiles.download<int32_t>();
    const cuda::WorkList list = cuda::work_list(words.data(), s.E);
    int32_t count = 0, experts = 0;
    bool good = true;
    std::vector<bool> seen(static_cast<size_t>(s.E), false);
    for (int64_t i = 0; i < s.E; i++) {  // by rows, descending, then by number
      const cuda::WorkExpert& own = list.experts[i];
      if (own.expert < 0 || own.expert >= s.E || seen[static_cast<size_t>(own.expert)]) return false;
      seen[static_cast<size_t>(own.expert)] = true;
      const int32_t rows = own.row_end - own.row;
      good &= own.row == offset[static_cast<size_t>(own.expert)] && own.row_end == offset[static_cast<size_t>(own.expert) + 1];
      if (i > 0) {
        const cuda::WorkExpert& before = list.experts[i - 1];
        const int32_t more = before.row_end - before.row;
        good &= more > rows || (more == rows && before.expert < own.expert);
      }
      experts += rows > 0;
    }
    for (const int32_t odd : {0, 1})
      for (int32_t e = 0; e < s.E; e++) {
        const int32_t begin = offset[static_cast<size_t>(e)], end = offset[static_cast<size_t>(e) + 1];
        if ((end - begin + cuda::kTileRows - 1) / cuda::kTileRows % 2 != odd) continue;
        for (int32_t row = begin; row < end; row += cuda::kTileRows) {
          const cuda::WorkTile& tile = list.tiles[count++];
          good &= tile.expert == e && tile.row == row && tile.row_end == end;
        }
      }
    return good && list.header->tiles == count && list.header->rows == offset[static_cast<size_t>(s.E)] && list.header->experts == experts;
  }
};

using Rng = std::mt19937_64;

// Expert ids [T, K], different within a token; about `dropped` of them outside [0, E).
std::vector<int64_t> random_ids(int64_t T, int64_t E, int64_t K, double dropped, Rng& rng, std::optional<int64_t> all_to = {}) {
  std::vector<int64_t> ids(static_cast<size_t>(T * K));
  std::vector<uint8_t> taken(static_cast<size_t>(E), 0);
  for (int64_t t = 0; t < T; t++) {
    int64_t* row = &ids[static_cast<size_t>(t * K)];
    for (int64_t k = 0; k < K; k++) {
      int64_t e = all_to && k == 0 ? *all_to : static_cast<int64_t>(rng() % static_cast<uint64_t>(E));
      while (taken[static_cast<size_t>(e)]) e = (e + 1) % E;
      taken[static_cast<size_t>(e)] = 1;
      row[k] = e;
    }
    for (int64_t k = 0; k < K; k++) taken[static_cast<size_t>(row[k])] = 0;
    for (int64_t k = 0; k < K; k++)
      if (static_cast<double>(rng() >> 11) * 0x1p-53 < dropped) row[k] = E + static_cast<int64_t>(rng() % 3);
  }
  return ids;
}
std::vector<float> uniform(int64_t count, Rng& rng) {
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = static_cast<float>(rng() >> 40) * 0x1p-24f;
  return v;
}
std::vector<float> normal(int64_t count, Rng& rng, float deviation = 1) {
  std::vector<float> v(static_cast<size_t>(count));
  std::normal_distribution<float> distribution(0, deviation);
  for (float& x : v) x = distribution(rng);
  return v;
}
// The values in a narrower type, and what they then are as fp32.
DeviceMemory converted(std::vector<float>& v, DType dtype) {
  if (dtype == DType::F32) return on_device(v);
  std::vector<uint16_t> bits(v.size());
  for (size_t i = 0; i < v.size(); i++) {
    bits[i] = dtype == DType::BF16 ? BF16(v[i]).bits : F16(v[i]).bits;
    v[i] = dtype == DType::BF16 ? static_cast<float>(BF16(v[i])) : static_cast<float>(F16(v[i]));
  }
  return on_device(bits);
}
DeviceMemory ids_on_device(const std::vector<int64_t>& ids, DType dtype) {
  if (dtype == DType::I64) return on_device(ids);
  return on_device(std::vector<int32_t>(ids.begin(), ids.end()));
}

// Runs `run` twice on fresh poisoned routings and compares both with `expected`.
template <class Run>
void expect_routing(Verdict& verdict, const std::string& name, const Shape& s, const Arrays& expected, Run run) {
  for (int turn = 0; turn < 2; turn++) {
    DeviceRouting out(s);
    run(out);
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    const std::string difference = expected.difference(out.get(), s);
    verdict(difference.empty(), name + ": " + difference);
    verdict(out.guards_hold(), name + ": guards");
    verdict(out.work_list_holds(expected.offsets), name + ": work list");
  }
}

struct Setting {
  int64_t T, E, K;
  double dropped = 0;
  std::optional<int64_t> all_to = {};
};
std::vector<Setting> settings(bool small) {
  std::vector<Setting> list = {{0, 5, 2},        {1, 1, 1},          {1, 300, 7},    {300, 1, 1},       {777, 7, 3, 0.3},
                               {100, 5, 2, 1.1}, {1000, 64, 6, 0.1}, {600, 4096, 5}, {513, 32, 1, 0, 3}};
  if (!small)
    for (const Setting& c : {Setting{24576, 128, 8}, {32768, 512, 10, 0.05}, {5000, 4096, 128}, {20000, 2, 2}, {40000, 256, 4, 0, 255}})
      list.push_back(c);
  return list;
}

bool check_metadata(bool small) {
  Verdict verdict;
  Rng rng(1);
  int turn = 0;
  for (const Setting& c : settings(small)) {
    const std::string name = fmt::format("({}, {}, {}, {})", c.T, c.E, c.K, c.dropped);
    const DType id_type = turn++ % 2 ? DType::I64 : DType::I32;
    const std::vector<int64_t> ids = random_ids(c.T, c.E, c.K, c.dropped, rng, c.all_to);
    const std::vector<float> weights = uniform(c.T * c.K, rng);
    {
      const Shape s{.T = c.T, .d = 8, .n = 8, .E = c.E, .K = c.K, .R_cap = c.T * c.K, .kind = RoutingKind::TopK};
      const DeviceMemory scratch(cuda::index_scratch(s));
      Arrays expected(s);
      cpu::index_topk({s, ids.data(), DType::I64, expected.views(), nullptr}, {});
      std::vector<int64_t> signed_ids = ids;  // half of the ids to drop are negative
      for (size_t i = 0; i < ids.size(); i += 2)
        if (ids[i] >= c.E) signed_ids[i] = -1 - static_cast<int64_t>(i);
      const DeviceMemory d_ids = ids_on_device(signed_ids, id_type);
      expect_routing(verdict, "topk " + name, s, expected, [&](const DeviceRouting& out) {
        cuda::index_topk({s, d_ids.data(), id_type, out.views(), scratch.data()}, {});
      });
      verdict(scratch.guards_hold(), "topk " + name + ": scratch");
    }
    const int64_t spare = turn % 2 ? 5 : 0;  // dropped pairs at the end
    const Shape s{.T = c.T, .d = 8, .n = 8, .E = c.E, .R_cap = c.T * c.K + spare, .kind = RoutingKind::Lists};
    std::vector<int64_t> tokens, experts, place(static_cast<size_t>(s.R_cap));
    for (size_t i = 0; i < place.size(); i++) place[i] = static_cast<int64_t>(i);
    std::shuffle(place.begin(), place.end(), rng);
    std::vector<float> scores;
    for (int64_t i : place) {
      const bool real = i < c.T * c.K;
      tokens.push_back(real ? i / c.K : 0);
      experts.push_back(real ? ids[static_cast<size_t>(i)] : c.E);
      scores.push_back(real ? weights[static_cast<size_t>(i)] : 0.5f);
    }
    const DeviceMemory scratch(cuda::index_scratch(s)), d_tokens = ids_on_device(tokens, id_type), d_experts = ids_on_device(experts, id_type),
                                                        d_scores = on_device(scores);
    Arrays expected(s);
    cpu::index_lists({s, tokens.data(), experts.data(), DType::I64, scores.data(), expected.order.data(), expected.views(), nullptr}, {});
    expect_routing(verdict, "lists " + name, s, expected, [&](const DeviceRouting& out) {
      cuda::index_lists({s, d_tokens.data(), d_experts.data(), id_type, d_scores.data(), out.order.data<int32_t>(), out.views(), scratch.data()}, {});
    });
    // The same routing, ready-made but for offsets, token_offsets and the inverse map.
    expect_routing(verdict, "ready-made " + name, s, expected, [&](DeviceRouting& out) {
      out.token.upload(expected.token.data(), out.token.size()), out.expert.upload(expected.expert.data(), out.expert.size());
      out.score.upload(expected.score.data(), out.score.size()), out.order.upload(expected.order.data(), out.order.size());
      out.counts.upload(expected.counts.data(), out.counts.size());
      cuda::index_rows({s, out.views(), scratch.data()}, {});
    });
    Shape rows = s;
    rows.kind = RoutingKind::Rows, rows.T = rows.R_cap;
    expect_routing(verdict, "rows " + name, rows, expected, [&](const DeviceRouting& out) {
      MACHMOE_CUDA_CALL(cudaMemcpy(out.counts.data(), expected.counts.data(), out.counts.size(), cudaMemcpyHostToDevice));
      Routing views = out.views();
      views.token = nullptr;
      cuda::index_rows({rows, views, nullptr}, {});
    });
    Arrays cut = expected;  // more rows than the capacity: a long expert is cut off, those behind it have none
    cut.counts[static_cast<size_t>(c.E / 2)] += static_cast<int32_t>(s.R_cap);
    for (size_t e = 0; e < cut.counts.size(); e++)
      cut.offsets[e + 1] = static_cast<int32_t>(std::min(int64_t{cut.offsets[e]} + cut.counts[e], s.R_cap));
    expect_routing(verdict, "rows beyond the capacity " + name, rows, cut, [&](DeviceRouting& out) {
      out.counts.upload(cut.counts.data(), out.counts.size());
      Routing views = out.views();
      views.token = nullptr;
      cuda::index_rows({rows, views, nullptr}, {});
    });
    verdict(scratch.guards_hold(), "lists " + name + ": scratch");
  }
  return verdict.summary("metadata");
}

double error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); i++) {
    difference += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
    norm += double(b[i]) * double(b[i]);
  }
  return norm == 0 ? (difference == 0 ? 0 : INFINITY) : std::sqrt(difference / norm);
}
std::vector<float> widened(const DeviceMemory& memory, DType dtype) {
  if (dtype == DType::F32) return memory.download<float>();
  std::vector<float> v;
  for (uint16_t bits : memory.download<uint16_t>()) {
    BF16 b;
    F16 f;
    b.bits = f.bits = bits;
    v.push_back(dtype == DType::BF16 ? static_cast<float>(b) : static_cast<float>(f));
  }
  return v;
}

bool check_router(bool small) {
  Verdict verdict;
  Rng rng(2);
  int turn = 0;
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{1, 1},   {5, 5},    {32, 4},   {33, 16},  {64, 6},  {128, 8},   {200, 3},
                                                          {256, 8}, {384, 16}, {512, 10}, {512, 17}, {513, 4}, {1000, 30}, {4096, 128}};
  for (const auto& [E, K] : sizes)
    for (RouterKind kind : {RouterKind::TopkSoftmax, RouterKind::SoftmaxTopk, RouterKind::SoftmaxTopkNorm})
      for (int64_t T : {int64_t{0}, int64_t{1}, small ? int64_t{70} : int64_t{9000}}) {
        if (E > 1000 && T > 1000) T = 1500;
        const DType dtype = std::array{DType::F32, DType::BF16, DType::F16}[static_cast<size_t>(turn++ % 3)];
        const std::string name = fmt::format("T {} E {} K {} kind {} dtype {}", T, E, K, static_cast<int>(kind), static_cast<int>(dtype));
        std::vector<float> logits = normal(T * E, rng, 2);
        if (turn % 4 == 0)
          for (float& x : logits) x = std::round(x);                      // ties
        if (turn % 8 == 0) std::fill(logits.begin(), logits.end(), 0.f);  // nothing but ties
        const DeviceMemory d_logits = converted(logits, dtype), scratch(cuda::topk_scratch(T, E, K));
        const auto slots = static_cast<size_t>(T * K), cells = static_cast<size_t>(T * E);
        std::vector<int32_t> ids(slots), counts(static_cast<size_t>(E));
        std::vector<float> weights(slots), aux(1), dweights = normal(T * K, rng), daux = {0.7f}, dlogits(cells);
        cpu::topk({T, E, K, kind, logits.data(), DType::F32, ids.data(), weights.data(), counts.data(), aux.data(), nullptr}, {});
        std::vector<float> first;
        DeviceMemory d_ids(4 * slots), d_weights(4 * slots), d_counts(4 * static_cast<size_t>(E)), d_aux(4);
        for (int run = 0; run < 3; run++) {  // the last without aux
          d_ids = DeviceMemory(4 * slots), d_weights = DeviceMemory(4 * slots), d_counts = DeviceMemory(4 * static_cast<size_t>(E));
          if (run < 2) d_aux = DeviceMemory(4);
          cuda::topk({T, E, K, kind, d_logits.data(), dtype, d_ids.data<int32_t>(), d_weights.data(), d_counts.data<int32_t>(),
                      run < 2 ? d_aux.data() : nullptr, scratch.data()},
                     {});
          MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
          verdict(d_ids.download<int32_t>() == ids, name + ": ids");
          verdict(d_counts.download<int32_t>() == counts, name + ": counts");
          verdict(error(d_weights.download<float>(), weights) <= 1e-5, name + ": weights");
          verdict(error(d_aux.download<float>(), aux) <= 1e-4, name + fmt::format(": aux {} {}", d_aux.download<float>()[0], aux[0]));
          verdict(d_ids.guards_hold() && d_weights.guards_hold() && d_counts.guards_hold() && d_aux.guards_hold() && scratch.guards_hold(),
                  name + ": guards");
          std::vector<float> bits = d_weights.download<float>();
          bits.push_back(d_aux.download<float>()[0]);
          if (run == 0) first = bits;
          verdict(bits == first, name + ": second run");
        }
        // Backward from dweights, and from dS partials through the inverse map.
        const int64_t parts = 3, R_cap = T * K;
        std::vector<int32_t> inverse(slots);
        for (size_t i = 0; i < slots; i++) inverse[i] = i % 11 == 5 ? -1 : static_cast<int32_t>((i * 7 + 3) % slots);
        const std::vector<float> ds_parts = normal(parts * R_cap, rng);
        const DeviceMemory d_dweights = on_device(dweights), d_inverse = on_device(inverse), d_parts = on_device(ds_parts), d_daux = on_device(daux);
        for (bool from_parts : {false, true})
          for (bool with_aux : {false, true}) {
            cpu::topk_backward(
                {T, E, K, kind, logits.data(), DType::F32, ids.data(), weights.data(), counts.data(), from_parts ? nullptr : dweights.data(),
                 ds_parts.data(), parts, inverse.data(), R_cap, with_aux ? daux.data() : nullptr, dlogits.data()},
                {});
            const DeviceMemory out(cells * size_of(dtype));
            cuda::topk_backward({T, E, K, kind, d_logits.data(), dtype, d_ids.data<int32_t>(), d_weights.data(), d_counts.data<int32_t>(),
                                 from_parts ? nullptr : d_dweights.data(), d_parts.data(), parts, d_inverse.data<int32_t>(), R_cap,
                                 with_aux ? d_daux.data() : nullptr, out.data()},
                                {});
            MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
            const double e = error(widened(out, dtype), dlogits);
            verdict(e <= (dtype == DType::F32 ? 2e-6 : 4e-3) || K == 1, fmt::format("{}: dlogits {} parts {} aux {}", name, e, from_parts, with_aux));
            verdict(out.guards_hold(), name + ": dlogits guards");
          }
      }
  return verdict.summary("router");
}

// NaN ranks as infinity, and weights are NaN where the CPU's are.
bool check_special_logits() {
  Verdict verdict;
  Rng rng(5);
  const std::array<float, 5> special = {NAN, -NAN, INFINITY, -INFINITY, -0.f};
  for (const auto& [E, K] : {std::pair<int64_t, int64_t>{3, 2}, {40, 8}, {128, 8}, {250, 16}, {512, 10}, {600, 20}})
    for (RouterKind kind : {RouterKind::TopkSoftmax, RouterKind::SoftmaxTopk, RouterKind::SoftmaxTopkNorm})
      for (int share : {1, 20, 100}) {  // percent of special values
        const int64_t T = 200;
        std::vector<float> logits = normal(T * E, rng, 2);
        for (float& x : logits)
          if (static_cast<int>(rng() % 100) < share) x = special[(x > 0 && share == 1 ? 2 : 0) + rng() % (share == 1 ? 3 : 5)];
        const auto slots = static_cast<size_t>(T * K);
        std::vector<int32_t> ids(slots), counts(static_cast<size_t>(E));
        std::vector<float> weights(slots);
        cpu::topk({T, E, K, kind, logits.data(), DType::F32, ids.data(), weights.data(), counts.data(), nullptr, nullptr}, {});
        const DeviceMemory d_logits = on_device(logits), d_ids(4 * slots), d_weights(4 * slots), d_counts(4 * static_cast<size_t>(E)), d_aux(4),
                           scratch(cuda::topk_scratch(T, E, K));
        cuda::topk({T, E, K, kind, d_logits.data(), DType::F32, d_ids.data<int32_t>(), d_weights.data(), d_counts.data<int32_t>(), d_aux.data(),
                    scratch.data()},
                   {});
        MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
        const std::string name = fmt::format("E {} K {} kind {} special {} %", E, K, static_cast<int>(kind), share);
        verdict(d_ids.download<int32_t>() == ids, name + ": ids");
        verdict(d_counts.download<int32_t>() == counts, name + ": counts");
        const std::vector<float> got = d_weights.download<float>();
        bool same = true;
        for (size_t i = 0; i < slots; i++)
          same &= std::isnan(weights[i]) ? std::isnan(got[i]) : std::abs(got[i] - weights[i]) <= 1e-5f * std::abs(weights[i]) + 1e-30f;
        verdict(same, name + ": weights");
      }
  return verdict.summary("special logits");
}

std::vector<float> softmax_scores(int64_t T, int64_t E, Rng& rng, float deviation = 2) {
  std::vector<float> s = normal(T * E, rng, deviation);
  for (int64_t t = 0; t < T; t++) {
    float* row = &s[static_cast<size_t>(t * E)];
    float sum = 0;
    for (int64_t e = 0; e < E; e++) sum += row[e] = std::exp(row[e]);
    for (int64_t e = 0; e < E; e++) row[e] /= sum;
  }
  return s;
}

// The gradient of the scores against its definition in fp64, from NaN in d_scores and in the rows past R; twice the same bits.
void check_rounding_gradient(Verdict& verdict, const std::string& name, const Shape& s, bool renormalize, const std::vector<float>& scores,
                             Arrays routing, Rng& rng) {
  const auto R = static_cast<size_t>(routing.offsets[static_cast<size_t>(s.E)]);
  std::vector<float> ds = normal(s.R_cap, rng);
  std::fill(ds.begin() + static_cast<int64_t>(R), ds.end(), NAN);
  std::vector<double> sum(static_cast<size_t>(s.T), 0), mean = sum, size = sum, expected(scores.size(), 0), tolerance = expected;
  const auto each_row = [&](auto f) {  // f(row, token, pair)
    for (size_t row = 0; row < R; row++) {
      const auto t = static_cast<size_t>(routing.token[row]);
      f(row, t, t * static_cast<size_t>(s.E) + static_cast<size_t>(routing.expert[row]));
    }
  };
  if (renormalize) {
    each_row([&](size_t, size_t t, size_t pair) { sum[t] += scores[pair]; });
    each_row([&](size_t row, size_t t, size_t pair) {
      if (sum[t] == 0) return;
      mean[t] += scores[pair] / sum[t] * ds[row];
      size[t] += std::abs(ds[row]);
    });
  }
  each_row([&](size_t row, size_t t, size_t pair) {
    const double scale = sum[t] > 0 ? 1 / sum[t] : 1;
    expected[pair] = scale * (ds[row] - mean[t]);
    tolerance[pair] = 1e-6 * scale * size[t];
  });

  DeviceRouting d_routing(s);
  d_routing.expert.upload(routing.expert.data(), d_routing.expert.size()), d_routing.score.upload(routing.score.data(), d_routing.score.size());
  d_routing.token_offsets.upload(routing.token_offsets.data(), d_routing.token_offsets.size());
  d_routing.inverse.upload(routing.inverse.data(), d_routing.inverse.size());
  const DeviceMemory d_scores = on_device(scores), d_ds = on_device(ds);
  std::vector<float> first;
  for (int turn = 0; turn < 2; turn++) {
    const DeviceMemory out(sizeof(float) * scores.size());
    cuda::token_round_backward({s, renormalize, d_scores.data<float>(), d_routing.views(), d_ds.data<float>(), out.data<float>()}, {});
    MACHMOE_CUDA_CALL(cudaDeviceSynchronize());
    const std::vector<float> dp = out.download<float>();
    bool close = true;
    for (size_t i = 0; i < dp.size(); i++) close &= std::abs(dp[i] - expected[i]) <= tolerance[i];
    verdict(close, name + ": gradient");
    verdict(out.guards_hold(), name + ": gradient guards");
    verdict(turn == 0 || std::memcmp(first.data(), dp.data(), out.size()) == 0, name + ": gradient, second run");
    first = dp;
  }
}

bool check_token_rounding(bool small) {
  Verdict verdict;
  Rng rng(3);
  struct Rounding {
    int64_t T, E, K, tile;
  };
  std::vector<Rounding> list = {{300, 6, 2, 32},   {50, 6, 2, 1},    {20, 6, 2, 32},     {40, 64, 3, 8},     {129, 4, 1, 16},
                                {64, 5, 2, 64},    {70, 1, 1, 32},   {0, 4, 2, 8},       {200, 300, 17, 16}, {500, 200, 8, 64},
                                {300, 256, 4, 32}, {300, 60, 4, 32}, {300, 100, 16, 32}, {300, 130, 4, 32},  {300, 384, 9, 32}};
  if (!small)
    for (const Rounding& c :
         {Rounding{24576, 128, 8, 128}, {9000, 512, 10, 128}, {3000, 1500, 20, 128}, {1000, 4096, 3, 32}, {30000, 33, 4, 2048}, {50000, 20, 2, 128}})
      list.push_back(c);
  for (const Rounding& c : list)
    for (int kind = 0; kind < (c.T > 5000 ? 2 : 4); kind++) {
      std::vector<float> scores = softmax_scores(c.T, c.E, rng);
      if (kind == 1)
        for (float& x : scores) x = static_cast<float>(rng() % 3) / 4;
      if (kind == 2)
        for (size_t i = 0; i < scores.size(); i++) scores[i] = static_cast<int64_t>(i) / c.E % c.E == static_cast<int64_t>(i) % c.E;
      if (kind == 3) std::fill(scores.begin(), scores.end(), 0.f);
      const DeviceMemory d_scores = on_device(scores);
      for (int rule = 0; rule < 6; rule++) {
        const auto r = static_cast<RoundingRule>(rule);
        const Shape s{.T = c.T, .d = 8, .n = 8, .E = c.E, .R_cap = rounded_capacity(c.T, c.E, c.K, c.tile, r), .kind = RoutingKind::Lists};
        const std::string name = fmt::format("rounding T {} E {} K {} tile {} rule {} scores {}", c.T, c.E, c.K, c.tile, rule, kind);
        const bool renormalize = (rule + kind) % 2;
        Arrays expected(s);
        cpu::token_round({s, c.K, c.tile, r, renormalize, 11, scores.data(), expected.views(), nullptr}, {});
        std::fill(expected.order.begin(), expected.order.end(), -1);  // not of this op: as poisoned
        const DeviceMemory scratch(cuda::token_round_scratch(s));
        expect_routing(verdict, name, s, expected, [&](const DeviceRouting& out) {
          cuda::token_round({s, c.K, c.tile, r, renormalize, 11, d_scores.data<float>(), out.views(), scratch.data()}, {});
        });
        if (rule == 0) {  // from scores that no vector can be loaded from
          std::vector<float> moved(scores.size() + 1);
          std::copy(scores.begin(), scores.end(), moved.begin() + 1);
          const DeviceMemory d_moved = on_device(moved);
          expect_routing(verdict, name + " moved", s, expected, [&](const DeviceRouting& out) {
            cuda::token_round({s, c.K, c.tile, r, renormalize, 11, d_moved.data<float>() + 1, out.views(), scratch.data()}, {});
          });
        }
        verdict(scratch.guards_hold(), name + ": scratch");
        check_rounding_gradient(verdict, name, s, renormalize, scores, expected, rng);
      }
    }
  return verdict.summary("token rounding");
}

void perf() {
  Rng rng(4);
  printf("%-22s %9s %9s %9s %9s %9s %9s %9s | %s\n", "us (T, E, K)", "topk f32", "topk bf16", "backward", "index", "lists", "ready", "rows",
         "token rounding NR-f, SR-f, NR-s, up, down, balance-f; NR-f's gradient");
  for (const auto& [T, E, K] : {std::tuple<int64_t, int64_t, int64_t>{24576, 128, 8},
                                {24576, 32, 2},
                                {32768, 256, 16},
                                {32768, 512, 10},
                                {16384, 256, 8},
                                {40960, 128, 8},
                                {1024, 128, 8},
                                {16384, 512, 10},
                                {16384, 256, 4}}) {
    const Shape s{.T = T, .d = 8, .n = 8, .E = E, .K = K, .R_cap = T * K, .kind = RoutingKind::TopK};
    const DeviceRouting out(s);
    std::vector<float> logits = normal(T * E, rng), copy = logits;
    const DeviceMemory d_logits = on_device(logits), half = converted(copy, DType::BF16), ids(4 * T * K), weights(4 * T * K), aux(4),
                       scratch(cuda::topk_scratch(T, E, K)), dlogits(4 * T * E);
    const DeviceMemory index(cuda::index_scratch(s)), parts = on_device(normal(T * K, rng));
    const auto topk = [&](const DeviceMemory& from, DType dtype) {
      return microseconds([&](Stream stream) {
        cuda::topk({T, E, K, RouterKind::TopkSoftmax, from.data(), dtype, ids.data<int32_t>(), weights.data(), out.counts.data<int32_t>(), aux.data(),
                    scratch.data()},
                   stream);
      });
    };
    printf("(%5ld, %3ld, %2ld)        %9.1f %9.1f", T, E, K, topk(d_logits, DType::F32), topk(half, DType::BF16));
    cuda::index_topk({s, ids.data(), DType::I32, out.views(), index.data()}, {});
    printf(" %9.1f", microseconds([&](Stream stream) {
             cuda::topk_backward({T, E, K, RouterKind::TopkSoftmax, half.data(), DType::BF16, ids.data<int32_t>(), weights.data(),
                                  out.counts.data<int32_t>(), nullptr, parts.data(), 1, out.inverse.data<int32_t>(), T * K, nullptr, dlogits.data()},
                                 stream);
           }));
    printf(" %9.1f", microseconds([&](Stream stream) { cuda::index_topk({s, ids.data(), DType::I32, out.views(), index.data()}, stream); }));
    Shape lists = s;
    lists.kind = RoutingKind::Lists;
    const DeviceRouting other(lists);
    const DeviceMemory list_scratch(cuda::index_scratch(lists));
    std::vector<int32_t> tokens = out.get().order;
    for (int32_t& token : tokens) token /= static_cast<int32_t>(K);
    const DeviceMemory d_tokens = on_device(tokens);
    printf(" %9.1f", microseconds([&](Stream stream) {
             cuda::index_lists(
                 {lists, d_tokens.data(), out.expert.data(), DType::I32, parts.data<float>(), nullptr, other.views(), list_scratch.data()}, stream);
           }));
    printf(" %9.1f", microseconds([&](Stream stream) { cuda::index_rows({lists, other.views(), list_scratch.data()}, stream); }));
    Shape rows = s;
    rows.kind = RoutingKind::Rows, rows.T = rows.R_cap;
    Routing views = out.views();
    views.token = nullptr;
    printf(" %9.1f |", microseconds([&](Stream stream) { cuda::index_rows({rows, views, nullptr}, stream); }));
    const DeviceMemory scores = on_device(softmax_scores(T, E, rng));
    double gradient = 0;  // of NR-f, renormalised
    for (int rule = 0; rule < 6; rule++) {
      const auto r = static_cast<RoundingRule>(rule);
      const Shape rounded{.T = T, .d = 8, .n = 8, .E = E, .R_cap = rounded_capacity(T, E, K, 128, r), .kind = RoutingKind::Lists};
      const DeviceRouting to(rounded);
      const DeviceMemory memory(cuda::token_round_scratch(rounded));
      printf(" %7.1f", microseconds([&](Stream stream) {
               cuda::token_round({rounded, K, 128, r, false, 11, scores.data<float>(), to.views(), memory.data()}, stream);
             }));
      if (r != RoundingRule::NrF) continue;
      const DeviceMemory ds = on_device(normal(rounded.R_cap, rng)), dp(4 * T * E);
      gradient = microseconds([&](Stream stream) {
        cuda::token_round_backward({rounded, true, scores.data<float>(), to.views(), ds.data<float>(), dp.data<float>()}, stream);
      });
    }
    printf("; %7.1f\n", gradient);
    fflush(stdout);
  }
}

}  // namespace
}  // namespace machmoe::test

int main(int argc, char** argv) {
  using namespace machmoe::test;
  const std::string mode = argc > 1 ? argv[1] : "check";
  try {
    if (mode == "perf") {
      perf();
      return 0;
    }
    const bool small = argc > 2 && !std::strcmp(argv[2], "small");
    const bool metadata = check_metadata(small), router = check_router(small), special = check_special_logits(),
               rounding = check_token_rounding(small);
    return !(metadata && router && special && rounding);
  } catch (const std::exception& e) {
    printf("%s\n", e.what());
    return 1;
  }
}
