// ParallelFor: every task exactly once, with a worker index that can select scratch memory.
#include "qwen1m/parallel_for.h"

#include <atomic>
#include <memory>

#include "inputs.h"
#include "test.h"

namespace qwen1m {
namespace {

Q1M_TEST(every_task_runs_once) {
  for (const int workers : {1, 2, 7}) {
    for (const int64_t tasks : {0, 1, 2, 6, 7, 8, 1000}) {
      const auto runs = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(tasks) + 1);
      test::threads(workers)(tasks, [&](int64_t task, int worker) {
        runs[static_cast<size_t>(task)]++;
        if (worker < 0 || worker >= workers) runs[static_cast<size_t>(tasks)]++;
      });
      for (int64_t task = 0; task < tasks; ++task) EXPECT(runs[static_cast<size_t>(task)] == 1);
      EXPECT(runs[static_cast<size_t>(tasks)] == 0);
    }
  }
}

Q1M_TEST(two_tasks_of_one_worker_never_overlap) {
  constexpr int kWorkers = 4;
  std::atomic<int> busy[kWorkers] = {};
  std::atomic<bool> overlap = false;
  test::threads(kWorkers)(500, [&](int64_t, int worker) {
    if (busy[worker].exchange(1) != 0) overlap = true;
    std::this_thread::yield();
    busy[worker] = 0;
  });
  EXPECT(!overlap);
}

Q1M_TEST(without_threads_tasks_run_in_order_on_worker_0) {
  int64_t expected = 0;
  ParallelFor{}(100, [&](int64_t task, int worker) {
    EXPECT_EQ(task, expected);
    EXPECT_EQ(worker, 0);
    ++expected;
  });
  EXPECT_EQ(expected, 100);
}

Q1M_TEST(no_more_workers_than_tasks) {
  ParallelFor parallel_for;
  parallel_for.max_workers = 8;
  static int launched;
  parallel_for.launch = [](int workers, void (*body)(void*, int), void* context) {
    launched = workers;
    for (int worker = 0; worker < workers; ++worker) body(context, worker);  // one after another
  };
  int64_t sum = 0;
  parallel_for(3, [&](int64_t task, int) { sum += task; });
  EXPECT_EQ(launched, 3);
  EXPECT_EQ(sum, 3);
}

}  // namespace
}  // namespace qwen1m
