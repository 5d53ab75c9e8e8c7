#pragma once

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/sparse_plan.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// prefill_attention (prefill_attention.h: formula, rotations, temperature, rounding) over the keys
/// that a plan (sparse_plan.h) selects, for rows of one segment [segment_begin, segment_end) of one
/// sequence.
///
/// The segment's rows are cut into tiles [t0, t1): t0 = segment_begin + a multiple of tile_tokens,
/// t1 = min(t0 + tile_tokens, segment_end), whichever of its rows are asked for. With [b, e) the
/// keys of a stage, every row i of the tile attends to the keys j <= i of
///   [max(b, t0 - hi + 1), min(e, t1 - lo))   for each run [lo, hi) of the head and stage,
///   each of the head's verticals,
/// a key once. So a run is dilated by the tile's rows and never masked back to the selected pairs:
/// those keys are loaded anyway and only add to what is attended to. The run [0, segment_end) is
/// dense attention. A row without keys gets out 0 and lse -infinity.
///
/// `exact`: the tiles of public implementations instead (64 rows, ranges that grow by 64 keys and
/// overshoot; rule in csrc/common/sparse/public_tiles.h), from runs that were planned with `exact`.
///
/// A row's result depends on its tile's keys only, not on the other rows of the call.
struct SparsePrefillParams {
  AnyView<3> out;            // [tokens, q_heads, D] written; fp32 or bf16; last dim contiguous
  TensorView<float, 2> lse;  // [tokens, q_heads] log of the softmax denominator; data may be null
  AnyView<3> q;              // [tokens, q_heads, D] as out: un-rotated, bias added
  AnyView<4> k_cache;        // [pages, kv_heads, 128, D] as out, contiguous: rotated, unscaled
  AnyView<4> v_cache;        // as k_cache
  TensorView<const int32_t, 2> block_table;     // [1, max_pages]
  TensorView<const float, 1> logit_scale;       // [1], usually s(n)^2 / sqrt(D); > 0
  TensorView<const float, 3> rope_table;        // [rows, D/2, 2] (cos, sin), contiguous
  TensorView<const int32_t, 2> verticals;       // [q_heads, capacity], contiguous; sparse_plan.h
  TensorView<const int32_t, 2> vertical_count;  // [q_heads, 3]
  TensorView<const int32_t, 4> runs;            // [q_heads, 3, capacity, 2], contiguous
  TensorView<const int32_t, 2> run_count;       // [q_heads, 3]
  /// [2, q_heads, capacity of verticals + 1, D] as out, contiguous: where a GPU gathers the keys
  /// and values of the verticals, a row more than those for its own notes. Written. May be null on
  /// the CPU, which gathers per tile.
  AnyView<4> scratch;
  int64_t q_begin = 0;  // token of row 0; rows are tokens q_begin .. within the segment
  int64_t segment_begin = 0, segment_end = 0;  // inside one DCA chunk
  DualChunk dual_chunk;
  int64_t tile_tokens = 128;  // a positive multiple of 64, at most 512; 64 if exact
  bool exact = false;
};

/// D is a multiple of 16. Runs are ascending and, unless exact, at least tile_tokens apart;
/// verticals ascending, each in the stage its count says. Throws qwen1m::Error on an argument that
/// does not fit.
void sparse_prefill_cpu(const SparsePrefillParams&, const ParallelFor&);

/// bf16, D 64 or 128, tile_tokens 64, 128 or 256, not exact. Values of tensors are not checked.
/// Asynchronous. On sm_90, 256 reads keys and values from L2 half as often as 128.
void sparse_prefill_cuda(const SparsePrefillParams&, Stream);

}  // namespace qwen1m
