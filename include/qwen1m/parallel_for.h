#pragma once
/// How a CPU kernel gets its threads. The caller owns the pool: inside torch it is torch's own, so
/// that one pool exists in the process; benches and C++ tests bring a std::thread one.

#include <atomic>
#include <cstdint>

namespace qwen1m {

/// A launcher: runs `body(context, worker)` once for every worker in [0, workers), possibly
/// concurrently, and returns when all have returned. `body` does not throw.
struct ParallelFor {
  int max_workers = 1;
  void (*launch)(int workers, void (*body)(void* context, int worker),
                 void* context) = [](int workers, void (*body)(void*, int), void* context) {
    for (int worker = 0; worker < workers; ++worker) body(context, worker);
  };

  /// Calls f(task, worker) for every task in [0, num_tasks). Tasks are taken in ascending order
  /// from a shared counter, so put the long ones first. A result must not depend on `worker`
  /// (it only selects scratch memory): then it is the same for any number of threads.
  template <typename F>
  void operator()(int64_t num_tasks, F&& f) const {
    if (num_tasks <= 0) return;
    struct Context {
      F& f;
      int64_t num_tasks;
      std::atomic<int64_t> next{0};
    } context{f, num_tasks};
    const int workers = static_cast<int>(num_tasks < max_workers ? num_tasks : max_workers);
    launch(
        workers,
        [](void* pointer, int worker) {
          auto& c = *static_cast<Context*>(pointer);
          for (int64_t task; (task = c.next.fetch_add(1, std::memory_order_relaxed)) < c.num_tasks;)
            c.f(task, worker);
        },
        &context);
  }
};

}  // namespace qwen1m
