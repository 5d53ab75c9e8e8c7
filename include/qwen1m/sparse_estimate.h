#pragma once

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Where a segment's attention lies, estimated from its last rows (MInference, arXiv:2407.02490,
/// algorithm 4; Qwen2.5-1M report, arXiv:2501.15383, section 5.2). Row r of q is token
/// i_r = segment_end - n + r; with p[r, j] the softmax over the keys j <= i_r of
/// logit_scale * <R(q_r), k_j>:
///   vertical[h, j] = sum_r p[r, j]          j = key, absolute
///   slash[h, o]    = sum_r p[r, i_r - o]    o = offset i - j; keys below 0 count 0
/// R rotates to the positions of attention (dual_chunk.h), or, if `critical`, to those that change
/// by one from key to key: m + chunk_len for the successive and m + chunk_size for the inter keys,
/// not clamped, m being the token's offset in its chunk. They serve the selection only.
/// Two passes over the keys (softmax sums, then probabilities), nothing of size rows x keys is
/// stored. Sums run in an order of their own that does not depend on the number of threads.
struct SparseEstimateParams {
  TensorView<float, 2> vertical;  // [q_heads, segment_end] written; rows contiguous
  TensorView<float, 2> slash;     // [q_heads, segment_end] written; rows contiguous
  AnyView<3> q;                   // [n, q_heads, D] un-rotated; n >= 1, tokens of one DCA chunk
  AnyView<4> k_cache;             // [pages, kv_heads, 128, D] as q, contiguous: rotated, unscaled
  TensorView<const int32_t, 2> block_table;  // [1, max_pages]
  TensorView<const float, 1> logit_scale;    // [1]; > 0
  TensorView<const float, 3> rope_table;     // [rows, D/2, 2]; critical: rows up to m + chunk_size
  int64_t segment_end = 0;                   // tokens; the segment's keys are [0, segment_end)
  DualChunk dual_chunk;
  bool critical = true;
};

/// D is a multiple of 16. Scratch: per thread one page of keys in fp32 and n x 128 scores per query
/// head of the group; shared: 3 floats per row, head and 4,096 keys. Throws qwen1m::Error on an
/// argument that does not fit.
void sparse_estimate_cpu(const SparseEstimateParams&, const ParallelFor&);

/// bf16, D 64 or 128, n <= 64. Values of tensors are not checked. Asynchronous.
void sparse_estimate_cuda(const SparseEstimateParams&, Stream);

}  // namespace qwen1m
