#pragma once

#include <torch/csrc/stable/ops.h>

#include "qwen1m/parallel_for.h"

namespace qwen1m::binding {

/// torch's own threads, so that the process has one pool (torch.set_num_threads holds for us too).
/// Inside another parallel region torch runs the whole range on the calling thread: each index is
/// still one worker.
inline ParallelFor torch_threads() {
  ParallelFor parallel_for;
  parallel_for.max_workers = static_cast<int>(torch::stable::get_num_threads());
  parallel_for.launch = [](int workers, void (*body)(void*, int), void* context) {
    if (workers == 1) return body(context, 0);
    torch::stable::parallel_for(0, workers, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int>(worker));
    });
  };
  return parallel_for;
}

}  // namespace qwen1m::binding
