#pragma once

#include "qwen1m/dual_chunk.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Dense causal attention of many query tokens over the paged KV cache, with Dual Chunk Attention
/// positions, in one pass and with one online softmax:
///   out[t, h] = sum_j softmax_j(logit_scale[b] * <R(q[t, h]), k_j>) v_j   over the keys j <= token
///   t
/// where R rotates the query to its inter, successive or intra position for the key range at hand
/// (dual_chunk.h). Sequence b owns the query rows cu_q[b] .. cu_q[b+1]-1, which are its last
/// tokens: row r is token kv_len[b] - (cu_q[b+1] - r). KV head of query head h: h / (q_heads /
/// kv_heads). Accumulation in fp32; the probabilities are rounded to bf16 where the hardware
/// multiplies bf16 pairs (docs/numerics.md). A row's result does not depend on the other rows of
/// the call, so any split of a prompt into calls gives the same bits.
struct PrefillAttentionParams {
  AnyView<3> out;            // [tokens, q_heads, D] written; fp32 or bf16; last dim contiguous
  TensorView<float, 2> lse;  // [tokens, q_heads] log of the softmax denominator; data may be null
  AnyView<3> q;              // [tokens, q_heads, D] as out: un-rotated, bias added
  AnyView<4> k_cache;        // [pages, kv_heads, 128, D] as out, contiguous: rotated, unscaled
  AnyView<4> v_cache;        // as k_cache
  TensorView<const int32_t, 2> block_table;  // [batch, max_pages]; entries past kv_len are not read
  TensorView<const int64_t, 1> cu_q;         // [batch + 1], ascending from 0 to tokens
  TensorView<const int64_t, 1> kv_len;       // [batch], tokens; >= the query rows of the sequence
  TensorView<const float, 1> logit_scale;    // [batch], usually s(n)^2 / sqrt(D); > 0
  TensorView<const float, 3> rope_table;     // [rows, D/2, 2] (cos, sin), contiguous
  DualChunk dual_chunk;
};

/// D is a multiple of 16. Throws qwen1m::Error on an argument that does not fit.
void prefill_attention_cpu(const PrefillAttentionParams&, const ParallelFor&);

/// sm_80 and later, with a kernel of its own for sm_90; QWEN1M_CUDA_KERNELS=sm80 in the environment
/// takes the sm_80 one everywhere. bf16, D 64 or 128, data and rows aligned to 16 bytes. All data
/// lie on the current device; their values are not checked, because that would stop the stream:
/// lengths, page numbers and the rows of rope_table must be right. Asynchronous. Throws
/// qwen1m::Error on a shape, dtype or stride that does not fit, and on a launch that fails.
void prefill_attention_cuda(const PrefillAttentionParams&, Stream);

/// On the current CUDA device (sm_80 or newer), asynchronously on `stream`: bf16, D 64 or 128. All
/// pointers are device memory, so the host checks shapes, strides and dtypes; the values of cu_q,
/// kv_len, block_table and logit_scale are the caller's responsibility. Throws qwen1m::Error on an
/// argument that does not fit and on a failed launch.
void prefill_attention_cuda(const PrefillAttentionParams&, Stream stream);

}  // namespace qwen1m
