#include "qwen1m/prefill_attention.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

PrefillAttentionParams params_of(const TensorMatch& match, const Tensor& out,
                                 const OptionalTensor& lse, const Tensor& q, const Tensor& k_cache,
                                 const Tensor& v_cache, const Tensor& block_table,
                                 const Tensor& cu_q, const Tensor& kv_len,
                                 const Tensor& logit_scale, const Tensor& rope_table,
                                 int64_t chunk_size, int64_t local_size) {
  return {.out = match.floats<3>(out, "out", "[tokens, q_heads, D]"),
          .lse = match.typed<float, 2>(lse, "lse", "[tokens, q_heads]"),
          .q = match.floats<3>(q, "q", "[tokens, q_heads, D]"),
          .k_cache = match.floats<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
          .v_cache = match.floats<4>(v_cache, "v_cache", "[pages, kv_heads, 128, D]"),
          .block_table =
              match.typed<const int32_t, 2>(block_table, "block_table", "[batch, max_pages]"),
          .cu_q = match.typed<const int64_t, 1>(cu_q, "cu_q", "[batch + 1]"),
          .kv_len = match.typed<const int64_t, 1>(kv_len, "kv_len", "[batch]"),
          .logit_scale = match.typed<const float, 1>(logit_scale, "logit_scale", "[batch]"),
          .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
          .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size}};
}

}  // namespace

void prefill_attention(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                       const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& cu_q, const Tensor& kv_len, const Tensor& logit_scale,
                       const Tensor& rope_table, int64_t chunk_size, int64_t local_size) {
  const TensorMatch match("prefill_attention");
  prefill_attention_cpu(params_of(match, out, lse, q, k_cache, v_cache, block_table, cu_q, kv_len,
                                  logit_scale, rope_table, chunk_size, local_size),
                        torch_threads());
}

#ifdef Q1M_CUDA_PREFILL_ATTENTION
static void prefill_attention_on_cuda(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                                      const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& block_table, const Tensor& cu_q,
                                      const Tensor& kv_len, const Tensor& logit_scale,
                                      const Tensor& rope_table, int64_t chunk_size,
                                      int64_t local_size) {
  const CudaScope scope("prefill_attention", q, "q");
  const TensorMatch match("prefill_attention", scope.device());
  prefill_attention_cuda(params_of(match, out, lse, q, k_cache, v_cache, block_table, cu_q, kv_len,
                                   logit_scale, rope_table, chunk_size, local_size),
                         scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("prefill_attention", TORCH_BOX(&qwen1m::binding::prefill_attention));
}

#ifdef Q1M_CUDA_PREFILL_ATTENTION
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("prefill_attention", TORCH_BOX(&qwen1m::binding::prefill_attention_on_cuda));
}
#endif
