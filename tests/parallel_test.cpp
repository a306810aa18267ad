// parallel_for: every index once, errors that do not depend on timing, on the library's own threads and on a host program's.
#include "cpu/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "machmoe/machmoe.h"

namespace machmoe::cpu {
namespace {

std::atomic<int> g_calls{0};

void run_on_fresh_threads(int threads, void (*work)(void*), void* context) {
  g_calls += threads;
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(work, context);
  for (auto& thread : all) thread.join();
}
void run_once(int, void (*work)(void*), void* context) { work(context); }

class Parallel : public testing::TestWithParam<machmoe_runner> {
 protected:
  void SetUp() override { machmoe_set_num_threads(3), machmoe_set_runner(GetParam()); }
  void TearDown() override { machmoe_set_num_threads(0), machmoe_set_runner(nullptr); }
};

TEST_P(Parallel, CallsEveryIndexOnce) {
  for (const int64_t count : {0, 1, 2, 3, 1000}) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
    parallel_for(count, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
    for (const auto& s : seen) EXPECT_EQ(s, 1);
  }
}

TEST_P(Parallel, NestedCallsRunOnTheirThread) {
  std::atomic<int> inner{0};
  parallel_for(8, [&](int64_t) {
    const auto caller = std::this_thread::get_id();
    parallel_for(4, [&](int64_t) { inner += std::this_thread::get_id() == caller; });
  });
  EXPECT_EQ(inner, 32);
}

TEST_P(Parallel, TheLowestFailureIsReportedHoweverThreadsRun) {
  for (int repeat = 0; repeat < 50; ++repeat) {
    try {
      parallel_for(100, [](int64_t i) {
        if (i == 7) std::this_thread::sleep_for(std::chrono::microseconds(200));
        if (i >= 7) throw std::runtime_error(std::to_string(i));
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) { EXPECT_STREQ(error.what(), "7"); }
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, Parallel, testing::Values(nullptr, run_on_fresh_threads, run_once));

TEST(Runner, IsUsedWhileItIsSetAndNoLonger) {
  machmoe_set_num_threads(2);
  machmoe_set_runner(run_on_fresh_threads);
  g_calls = 0;
  parallel_for(10, [](int64_t) {});
  EXPECT_EQ(g_calls, 2);
  machmoe_set_runner(nullptr);
  parallel_for(10, [](int64_t) {});
  EXPECT_EQ(g_calls, 2);
  machmoe_set_num_threads(0);
}

TEST(Runner, MayThrowAnything) {
  machmoe_set_num_threads(2);
  std::vector<int32_t> ids(512), counts(1);
  std::vector<float> logits(512), weights(512);
  const machmoe_route route{.struct_size = sizeof route,
                            .T = 512,
                            .E = 1,
                            .K = 1,
                            .logits = logits.data(),
                            .ids = ids.data(),
                            .weights = weights.data(),
                            .counts = counts.data()};
  const auto sentence_of = [&](machmoe_runner runner) {
    machmoe_set_runner(runner);
    EXPECT_EQ(MACHMOE_INTERNAL_ERROR, machmoe_route_forward(&route, nullptr, 0, nullptr));
    return std::string(machmoe_last_error());
  };
  EXPECT_EQ(sentence_of([](int, void (*)(void*), void*) { throw std::runtime_error("no threads"); }), "no threads");
  EXPECT_EQ(sentence_of([](int, void (*)(void*), void*) { throw 42; }),
            "the callback of machmoe_set_runner threw what is no std::exception, expected nothing thrown: catch it there");
  machmoe_set_runner(nullptr);
  EXPECT_EQ(MACHMOE_OK, machmoe_route_forward(&route, nullptr, 0, nullptr));
  machmoe_set_num_threads(0);
}

}  // namespace
}  // namespace machmoe::cpu
