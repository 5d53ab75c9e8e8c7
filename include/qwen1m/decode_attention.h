#pragma once

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Attention of the few newest tokens of each sequence over its whole paged KV cache: the
/// definition of prefill_attention.h with q_tokens query rows for every sequence and a logit_scale
/// for each row, the work split over the keys and the partial results merged in fp32. A sequence
/// with kv_len == 0 gives out = 0 and lse = -inf. The split depends on kv_len alone (on a GPU also
/// on q_tokens, the machine and the number of KV heads), never on the number of threads or on the
/// other sequences.
struct DecodeAttentionParams {
  AnyView<4> out;  // [batch, q_tokens, q_heads, D] written; fp32 or bf16; last dim contiguous
  TensorView<float, 3> lse;  // [batch, q_tokens, q_heads], natural log; data may be null
  AnyView<4> q;              // [batch, q_tokens, q_heads, D] as out: un-rotated, bias added
  AnyView<4> k_cache;        // [pages, kv_heads, 128, D], contiguous: rotated, without temperature;
                             // as out, or float8_e4m3fn with k_scale and v_scale
  AnyView<4> v_cache;        // as k_cache
  TensorView<const int32_t, 2> block_table;  // [batch, max_pages]; entries past kv_len are not read
  TensorView<const int64_t, 1> kv_len;       // [batch], tokens, the query tokens included
  TensorView<const float, 2> logit_scale;    // [batch, q_tokens], usually s(n)^2 / sqrt(D) of each
                                             // row's own n; > 0
  TensorView<const float, 3> rope_table;     // [rows, D/2, 2] (cos, sin), contiguous
  DualChunk dual_chunk;
  TensorView<uint8_t, 1>
      scratch{};  // GPU only, decode_attention_scratch_bytes; zero at first, then
                  // reused as it is by calls of any shape, one after the other
  TensorView<const float, 1> k_scale{};  // [kv_heads], > 0: key = k_scale * e4m3; null without fp8
  TensorView<const float, 1> v_scale{};  // as k_scale
};

/// D is a multiple of 16. Throws qwen1m::Error on an argument that does not fit.
void decode_attention_cpu(const DecodeAttentionParams&, const ParallelFor&);

/// bf16, D 64 or 128, with a cache in bf16 or fp8. One launch; nothing is read on the host, so that
/// a graph may hold it. Lengths, page numbers and scales are the caller's responsibility. Throws
/// qwen1m::Error on an argument that does not fit.
void decode_attention_cuda(const DecodeAttentionParams&, Stream);

/// What the scratch depends on.
struct DecodeAttentionShape {
  int64_t batch, q_tokens, q_heads, kv_heads, head_dim;
  int64_t max_tokens;  // of a sequence: max_pages * 128
  DualChunk dual_chunk;
};

/// Bytes of scratch of decode_attention_cuda on a GPU of num_sms multiprocessors.
int64_t decode_attention_scratch_bytes(const DecodeAttentionShape&, int num_sms);

}  // namespace qwen1m
