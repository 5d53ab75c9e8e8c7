#pragma once
/// How the GPU kernels of sparse_estimate cut the keys, and where row statistics lie between them.
///
/// Keys are cut into spans; a block does all heads of its span one tile of 32 keys after the other,
/// on the absolute grid. Three kernels follow each other:
///   statistics  of each span, row by row: maximum and sum of its logits' exponentials
///   combine     of each row, over the spans
///   sums        probabilities again, columns and diagonals added up
/// The op has no scratch: vertical and slash hold the statistics until the sums take their place.
/// Those of all spans fit, because rows <= span / 2 or there is one span; the combined ones lie
/// where span 0 writes, which is done last, in a launch of its own.

#include "arch/arch.h"
#include "common/attention/prefill_tile.h"
#include "qwen1m/sparse_estimate.h"
#include "qwen1m/sparse_plan.h"

namespace qwen1m {

/// Rows of q, at most.
inline constexpr int kEstimateRows = 64;
/// Keys of a tile.
inline constexpr int kEstimateKeys = 32;
/// Query heads of a block, at most: a warp each.
inline constexpr int kEstimateHeads = 4;

/// The launches of a call.
struct EstimateGrid {
  int64_t span;             // keys
  int64_t num_spans;        //
  int64_t blocks_of_group;  // that share the query heads of a KV head
  int64_t heads;            // query heads of a block; the last of a group may have fewer

  explicit EstimateGrid(const SparseEstimateParams& p) {
    // Enough blocks for a GPU when there are few keys; few statistics to combine when there are
    // many.
    span = p.segment_end <= 256 * 1024 ? 1024 : 4096;
    num_spans = (p.segment_end + span - 1) / span;
    const int64_t group = p.q.size(1) / p.k_cache.size(1);
    blocks_of_group = (group + kEstimateHeads - 1) / kEstimateHeads;
    heads = (group + blocks_of_group - 1) / blocks_of_group;
  }
};

struct SparseEstimateArgs {
  SparseEstimateParams op;
  EstimateGrid grid;
  int64_t first_span, num_spans;  // of this launch
};

/// The critical positions change by one from key to key; attention's own are clamped.
Q1M_HOST_DEVICE int64_t query_position(const SparseEstimateParams& p, int stage, int64_t token) {
  if (!p.critical) return query_position(p.dual_chunk, stage, token);
  return stage == 0   ? p.dual_chunk.offset(token) + p.dual_chunk.chunk_size
         : stage == 1 ? p.dual_chunk.offset(token) + p.dual_chunk.chunk_len()
                      : p.dual_chunk.offset(token);
}

/// Where the statistics of a row lie: of a span, and of all spans.
struct EstimateStatistics {
  float* m;  // maximum of the raw scores
  float* l;  // sum of exp2(scale (s - m)) and, combined, its reciprocal
};
Q1M_HOST_DEVICE EstimateStatistics statistics_of_span(const SparseEstimateParams& p, int64_t head,
                                                      int64_t span, int64_t row) {
  const int64_t index = span * p.q.size(0) + row;
  return {p.vertical.at(head, index), p.slash.at(head, index)};
}
/// Keys and offsets of span 0: the oldest keys are the largest offsets.
Q1M_HOST_DEVICE EstimateStatistics combined_statistics(const SparseEstimateParams& p, int64_t head,
                                                       int64_t row) {
  return {p.vertical.at(head, row), p.slash.at(head, p.segment_end - 1 - row)};
}

}  // namespace qwen1m
