#pragma once

#include <algorithm>

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Columns and diagonals that are selected before any other (MInference and Qwen2.5-1M): keys
/// [0, 30) and offsets [0, 100).
inline constexpr int64_t kForcedVerticals = 30, kForcedSlashes = 100;
/// Key ranges of a segment, the first index of the lists: 0 inter, 1 successive, 2 intra.
inline constexpr int64_t kStages = 3;
/// Entries that an empty list receives under `fallback`.
inline constexpr int64_t kFallbackEntries = 5;

/// Sizes of the lists that a plan may need, for budgets of a head as given (not clipped).
constexpr int64_t sparse_vertical_capacity(int64_t v_size, int64_t segment_end) {
  return std::min(v_size, segment_end) + kStages * kFallbackEntries;
}
constexpr int64_t sparse_run_capacity(int64_t s_size, int64_t segment_end, int64_t tile_tokens,
                                      bool exact) {
  const int64_t apart = exact ? 2 : tile_tokens + 1;  // from one run's begin to the next
  return std::max(std::min(s_size, (segment_end + apart - 1) / apart), kFallbackEntries);
}

/// From scores to what attention loads: per query head the `v_size` best columns and the `s_size`
/// best diagonals of a segment [segment_begin, segment_end), which lies in one DCA chunk.
///
/// Everything is absolute: row i meets key j on the diagonal of offset o = i - j, and the segment's
/// DCA borders (dual_chunk.h) cut the keys into three stages. A selection is
///   V: the min(v_size, segment_end) keys with the largest vertical_score,
///   S: the min(s_size, segment_end) offsets with the largest slash_score,
/// ties to the lower index; keys < 30 and offsets < 100 count as infinite. Budgets are taken as
/// they are: that public configuration files mean 130 by v_size 30 is their reader's business.
///
/// verticals[h]: V ascending; vertical_count[h, stage] of them lie in each stage (in this order).
/// runs[h, stage]: maximal runs [lo, hi) of the offsets of S that can meet the stage's keys
/// [b, e): max(0, segment_begin - e) <= o <= segment_end - 1 - b, ascending. Unless `exact`, runs
/// less than tile_tokens apart (lo of the next - hi < tile_tokens) become one, because the keys
/// that a full tile loads for them touch (sparse_prefill.h).
///
/// `group` neighbouring query heads (1, or q_heads / kv_heads) share one selection: their scores
/// are summed, in order, and the largest budgets of the group hold for each of them.
///
/// `fallback`: public implementations fill a stage list that is empty, because an empty row is a
/// NaN there: with n keys in the stage, the keys b + k max(1, n / 5), and the offsets
/// segment_begin - e + k max(1, n / 5) (intra: without segment_begin - e), k < min(5, n). An
/// engine does not need it.
struct SparsePlanParams {
  TensorView<int32_t, 2> verticals;           // [q_heads, capacity] written up to the count
  TensorView<int32_t, 2> vertical_count;      // [q_heads, 3] written
  TensorView<int32_t, 4> runs;                // [q_heads, 3, capacity, 2] written up to the count
  TensorView<int32_t, 2> run_count;           // [q_heads, 3] written
  TensorView<const float, 2> vertical_score;  // [q_heads, segment_end], rows contiguous
  TensorView<const float, 2> slash_score;     // [q_heads, segment_end] by offset, rows contiguous
  TensorView<const int64_t, 1> v_size;        // [q_heads], >= 0
  TensorView<const int64_t, 1> s_size;        // [q_heads], >= 0
  int64_t segment_begin = 0;
  DualChunk dual_chunk;
  int64_t tile_tokens = 128;  // of sparse_prefill
  int64_t group = 1;
  bool exact = false;
  bool fallback = false;
};

/// Capacities as above. The list tensors are contiguous. Throws qwen1m::Error on an argument that
/// does not fit.
void sparse_plan_cpu(const SparsePlanParams&, const ParallelFor&);

/// Same result, bit for bit. Values of tensors are not checked. Asynchronous.
void sparse_plan_cuda(const SparsePlanParams&, Stream);

}  // namespace qwen1m
