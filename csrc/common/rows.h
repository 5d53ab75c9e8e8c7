#pragma once

#include <algorithm>
#include <cstdint>

#include "qwen1m/parallel_for.h"

namespace qwen1m {

/// Elements of a task. Waking a thread costs a few microseconds, in which a core moves about this
/// much; one token of a 7B model (3,584 elements) then stays on the calling thread.
inline constexpr int64_t kRowTaskElems = 32 * 1024;

/// Calls f(row) for every row in [0, rows), whole rows of row_elems elements per task.
template <typename F>
void for_each_row(const ParallelFor& parallel_for, int64_t rows, int64_t row_elems, F&& f) {
  const int64_t rows_per_task =
      std::max<int64_t>(1, kRowTaskElems / std::max<int64_t>(1, row_elems));
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  parallel_for(tasks, [&](int64_t task, int /*worker*/) {
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) f(row);
  });
}

}  // namespace qwen1m
