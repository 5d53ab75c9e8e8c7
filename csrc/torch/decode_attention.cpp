#include "qwen1m/decode_attention.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

DecodeAttentionParams params_of(const TensorMatch& match, const Tensor& out,
                                const OptionalTensor& lse, const Tensor& q, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& block_table,
                                const Tensor& kv_len, const Tensor& logit_scale,
                                const Tensor& rope_table, int64_t chunk_size, int64_t local_size,
                                const OptionalTensor& scratch, const OptionalTensor& k_scale,
                                const OptionalTensor& v_scale) {
  return {
      .out = match.floats<4>(out, "out", "[batch, q_tokens, q_heads, D]"),
      .lse = match.typed<float, 3>(lse, "lse", "[batch, q_tokens, q_heads]"),
      .q = match.floats<4>(q, "q", "[batch, q_tokens, q_heads, D]"),
      .k_cache = match.cache<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
      .v_cache = match.cache<4>(v_cache, "v_cache", "[pages, kv_heads, 128, D]"),
      .block_table =
          match.typed<const int32_t, 2>(block_table, "block_table", "[batch, max_pages]"),
      .kv_len = match.typed<const int64_t, 1>(kv_len, "kv_len", "[batch]"),
      .logit_scale = match.typed<const float, 2>(logit_scale, "logit_scale", "[batch, q_tokens]"),
      .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
      .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size},
      .scratch = match.typed<uint8_t, 1>(scratch, "scratch", "[bytes]"),
      .k_scale = match.typed<const float, 1>(k_scale, "k_scale", "[kv_heads]"),
      .v_scale = match.typed<const float, 1>(v_scale, "v_scale", "[kv_heads]")};
}

}  // namespace

void decode_attention(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                      const Tensor& kv_len, const Tensor& logit_scale, const Tensor& rope_table,
                      int64_t chunk_size, int64_t local_size, const OptionalTensor& scratch,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const TensorMatch match("decode_attention");
  decode_attention_cpu(
      params_of(match, out, lse, q, k_cache, v_cache, block_table, kv_len, logit_scale, rope_table,
                chunk_size, local_size, scratch, k_scale, v_scale),
      torch_threads());
}

#ifdef Q1M_CUDA_DECODE_ATTENTION
static void decode_attention_on_cuda(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                                     const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& block_table, const Tensor& kv_len,
                                     const Tensor& logit_scale, const Tensor& rope_table,
                                     int64_t chunk_size, int64_t local_size,
                                     const OptionalTensor& scratch, const OptionalTensor& k_scale,
                                     const OptionalTensor& v_scale) {
  const CudaScope scope("decode_attention", q, "q");
  const TensorMatch match("decode_attention", scope.device());
  decode_attention_cuda(
      params_of(match, out, lse, q, k_cache, v_cache, block_table, kv_len, logit_scale, rope_table,
                chunk_size, local_size, scratch, k_scale, v_scale),
      scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&qwen1m::binding::decode_attention));
}

#ifdef Q1M_CUDA_DECODE_ATTENTION
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&qwen1m::binding::decode_attention_on_cuda));
}
#endif
