#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace machmoe::cpu {
namespace {

std::atomic<int> g_threads{0};  // 0 = all cores
std::atomic<Runner> g_runner{nullptr};
thread_local bool t_inside = false;

// The iterations of one parallel_for: any number of threads may work() on them at once.
class Loop {
 public:
  Loop(int64_t count, detail::Body body, void* context) : count_(count), body_(body), context_(context) {}

  void work() {
    t_inside = true;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      try {
        body_(context_, i);
      } catch (...) {
        next_ = count_;
        std::lock_guard lock(mutex_);
        if (!error_ || i < error_index_) error_ = std::current_exception(), error_index_ = i;
      }
    }
    t_inside = false;
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t count_;
  const detail::Body body_;
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;  // of the lowest i that failed: indices are handed out in order, so no lower one is left undone
  int64_t error_index_ = 0;
};

// One parallel_for at a time. Workers wait for a new epoch; those beyond the current thread count sleep on.
class Pool {
 public:
  // False: the pool serves another thread.
  bool run(Loop& loop, int helpers) {
    std::unique_lock use(in_use_, std::try_to_lock);
    if (!use.owns_lock()) return false;
    {
      std::lock_guard lock(mutex_);
      while (workers_ < helpers) {
        std::thread([this, rank = workers_, seen = epoch_] { serve(rank, seen); }).detach();
        ++workers_;
      }
      loop_ = &loop;
      helpers_ = pending_ = helpers;
      ++epoch_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return pending_ == 0; });
    return true;
  }

 private:
  void serve(int rank, uint64_t seen) {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (rank >= helpers_) continue;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  Loop* loop_ = nullptr;
  int helpers_ = 0, pending_ = 0;
  uint64_t epoch_ = 0;
};

// Never destroyed: workers sleep on it until the process ends. Threads do not survive fork(), so a child starts with a pool of its own.
Pool* g_pool = nullptr;
Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

}  // namespace

void set_num_threads(int threads) { g_threads = std::max(threads, 0); }

int num_threads() {
  const int set = g_threads;
  return set > 0 ? set : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void set_runner(Runner runner) { g_runner = runner; }

void detail::run(int64_t count, Body body, void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  if (threads > 1 && !t_inside) {
    Loop loop(count, body, context);
    const Runner runner = g_runner;
    if (runner)
      runner(
          threads, [](void* l) { static_cast<Loop*>(l)->work(); }, &loop);
    if (runner || pool().run(loop, threads - 1)) return loop.rethrow();
  }
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

}  // namespace machmoe::cpu
