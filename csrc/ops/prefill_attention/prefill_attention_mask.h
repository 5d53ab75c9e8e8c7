#pragma once
/// Which scores of a block of keys count, for the GPU kernels of prefill_attention.

#include <cmath>

#include "arch/arch.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"

namespace qwen1m {

/// Scores that a row may not see become -inf: keys outside of the walk's range, and behind `token`
/// (of the thread's first row; its second is 8 tokens later).
template <int kKeys>
Q1M_DEVICE void mask_scores(float (&s)[kKeys / 2], const KeyWalk<kKeys>& walk, int token) {
  // Relative to the thread's first column, so that each comparison is with a constant.
  const int column = walk.first_key() + 2 * (arch::lane_index() % 4);
  const int lo = walk.lo() - column;
  Q1M_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int end = token + 8 * h + 1;
    const int hi = (end < walk.hi() ? end : walk.hi()) - column;
    Q1M_UNROLL
    for (int j = 0; j < kKeys / 8; ++j) {
      Q1M_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e < lo || 8 * j + e >= hi) s[4 * j + 2 * h + e] = -INFINITY;
      }
    }
  }
}

}  // namespace qwen1m
