#include "qwen1m/qkv_rope_append.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

QkvRopeAppendParams params_of(const TensorMatch& match, const Tensor& q, const Tensor& k_cache,
                              const Tensor& v_cache, const Tensor& qkv, const OptionalTensor& bias,
                              const Tensor& positions, const Tensor& slot_mapping,
                              const Tensor& rope_table, int64_t chunk_len,
                              const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  return {.q = match.floats<3>(q, "q", "[tokens, q_heads, D]"),
          .k_cache = match.cache<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
          .v_cache = match.cache<4>(v_cache, "v_cache", "[pages, kv_heads, 128, D]"),
          .qkv = match.floats<2>(qkv, "qkv", "[tokens, (q_heads + 2 kv_heads) D]"),
          .bias = match.floats<1>(bias, "bias", "[(q_heads + 2 kv_heads) D]"),
          .positions = match.typed<const int64_t, 1>(positions, "positions", "[tokens]"),
          .slot_mapping = match.typed<const int64_t, 1>(slot_mapping, "slot_mapping", "[tokens]"),
          .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
          .chunk_len = chunk_len,
          .k_scale = match.typed<const float, 1>(k_scale, "k_scale", "[kv_heads]"),
          .v_scale = match.typed<const float, 1>(v_scale, "v_scale", "[kv_heads]")};
}

}  // namespace

void qkv_rope_append(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& qkv, const OptionalTensor& bias, const Tensor& positions,
                     const Tensor& slot_mapping, const Tensor& rope_table, int64_t chunk_len,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const TensorMatch match("qkv_rope_append");
  qkv_rope_append_cpu(params_of(match, q, k_cache, v_cache, qkv, bias, positions, slot_mapping,
                                rope_table, chunk_len, k_scale, v_scale),
                      torch_threads());
}

#ifdef Q1M_CUDA_QKV_ROPE_APPEND
static void qkv_rope_append_on_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& qkv, const OptionalTensor& bias,
                                    const Tensor& positions, const Tensor& slot_mapping,
                                    const Tensor& rope_table, int64_t chunk_len,
                                    const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const CudaScope scope("qkv_rope_append", q, "q");
  const TensorMatch match("qkv_rope_append", scope.device());
  qkv_rope_append_cuda(params_of(match, q, k_cache, v_cache, qkv, bias, positions, slot_mapping,
                                 rope_table, chunk_len, k_scale, v_scale),
                       scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("qkv_rope_append", TORCH_BOX(&qwen1m::binding::qkv_rope_append));
}

#ifdef Q1M_CUDA_QKV_ROPE_APPEND
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("qkv_rope_append", TORCH_BOX(&qwen1m::binding::qkv_rope_append_on_cuda));
}
#endif
