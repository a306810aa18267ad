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

std::atomic<int> g_threads{0};   // 0 = all cores
thread_local bool t_inside = false;

// One parallel_for at a time. Workers wait for a new epoch; those beyond the current thread count sleep on.
class Pool {
 public:
  // False: the pool serves another thread.
  bool run(int64_t count, int helpers, detail::Body body, void* context) {
    std::unique_lock use(in_use_, std::try_to_lock);
    if (!use.owns_lock()) return false;
    {
      std::lock_guard lock(mutex_);
      while (workers_ < helpers) {
        std::thread([this, rank = workers_, seen = epoch_] { serve(rank, seen); }).detach();
        ++workers_;
      }
      body_ = body;
      context_ = context;
      count_ = count;
      next_ = 0;
      helpers_ = pending_ = helpers;
      error_ = nullptr;
      ++epoch_;
    }
    wake_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return pending_ == 0; });
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  void serve(int rank, uint64_t seen) {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (rank >= helpers_) continue;
      lock.unlock();
      work();
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  void work() {
    t_inside = true;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      try {
        body_(context_, i);
      } catch (...) {
        next_ = count_;
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
    t_inside = false;
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  detail::Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int helpers_ = 0, pending_ = 0;
  uint64_t epoch_ = 0;
  std::exception_ptr error_;
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

void detail::run(int64_t count, Body body, void* context) {
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads(), count)) - 1;
  if (helpers > 0 && !t_inside && pool().run(count, helpers, body, context)) return;
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

}  // namespace machmoe::cpu
