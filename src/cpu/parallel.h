// A small thread pool. Work is cut by the caller from shapes and routing alone, so results never depend on the thread count.
#pragma once
#include <cstdint>
#include <type_traits>

namespace machmoe::cpu {

void set_num_threads(int threads);  // 0 = all cores; cheap, takes effect with the next parallel_for
int num_threads();
// Calls work(context) on up to `threads` threads at once and returns when all calls have returned. Null: the pool of this file.
// A host program with threads of its own (torch) lends them: two pools would fight for the same cores.
using Runner = void (*)(int threads, void (*work)(void* context), void* context);
void set_runner(Runner runner);

namespace detail {
using Body = void (*)(void* context, int64_t index);
void run(int64_t count, Body body, void* context);
}  // namespace detail

// Calls f(i) once for every i in [0, count), lowest first, on up to num_threads() threads. The exception of the lowest i that throws is rethrown here.
// A call from inside a worker, or while another thread uses the pool, runs on the caller's thread.
template <class F>
void parallel_for(int64_t count, F&& f) {
  using Fn = std::remove_reference_t<F>;
  detail::run(
      count, [](void* context, int64_t i) { (*static_cast<Fn*>(context))(i); }, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace machmoe::cpu
