#pragma once

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Attention of the few newest tokens of each sequence over its whole paged KV cache: the
/// definition of prefill_attention.h with q_tokens query rows for every sequence, the work split
/// over the keys and the partial results merged in fp32. A sequence with kv_len == 0 gives out = 0
/// and lse = -inf. The split depends on kv_len alone, never on the number of threads.
struct DecodeAttentionParams {
  AnyView<4> out;  // [batch, q_tokens, q_heads, D] written; fp32 or bf16; last dim contiguous
  TensorView<float, 3> lse;  // [batch, q_tokens, q_heads], natural log; data may be null
  AnyView<4> q;              // [batch, q_tokens, q_heads, D] as out: un-rotated, bias added
  AnyView<4> k_cache;        // [pages, kv_heads, 128, D] as out, contiguous: rotated, unscaled
  AnyView<4> v_cache;        // as k_cache
  TensorView<const int32_t, 2> block_table;  // [batch, max_pages]; entries past kv_len are not read
  TensorView<const int64_t, 1> kv_len;       // [batch], tokens, the query tokens included
  TensorView<const float, 1> logit_scale;    // [batch], usually s(n)^2 / sqrt(D); > 0
  TensorView<const float, 3> rope_table;     // [rows, D/2, 2] (cos, sin), contiguous
  DualChunk dual_chunk;
};

/// D is a multiple of 16. Throws qwen1m::Error on an argument that does not fit.
void decode_attention_cpu(const DecodeAttentionParams&, const ParallelFor&);

}  // namespace qwen1m
