#include "qwen1m/sparse_estimate.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {

namespace {

SparseEstimateParams params_of(const TensorMatch& match, const Tensor& vertical,
                               const Tensor& slash, const Tensor& q, const Tensor& k_cache,
                               const Tensor& block_table, const Tensor& logit_scale,
                               const Tensor& rope_table, int64_t segment_end, int64_t chunk_size,
                               int64_t local_size, bool critical) {
  return {
      .vertical = match.typed<float, 2>(vertical, "vertical", "[q_heads, segment_end]"),
      .slash = match.typed<float, 2>(slash, "slash", "[q_heads, segment_end]"),
      .q = match.floats<3>(q, "q", "[n, q_heads, D]"),
      .k_cache = match.floats<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
      .block_table = match.typed<const int32_t, 2>(block_table, "block_table", "[1, max_pages]"),
      .logit_scale = match.typed<const float, 1>(logit_scale, "logit_scale", "[1]"),
      .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
      .segment_end = segment_end,
      .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size},
      .critical = critical};
}

}  // namespace

void sparse_estimate(const Tensor& vertical, const Tensor& slash, const Tensor& q,
                     const Tensor& k_cache, const Tensor& block_table, const Tensor& logit_scale,
                     const Tensor& rope_table, int64_t segment_end, int64_t chunk_size,
                     int64_t local_size, bool critical) {
  const TensorMatch match("sparse_estimate");
  sparse_estimate_cpu(params_of(match, vertical, slash, q, k_cache, block_table, logit_scale,
                                rope_table, segment_end, chunk_size, local_size, critical),
                      torch_threads());
}

#ifdef Q1M_CUDA_SPARSE_ESTIMATE
static void sparse_estimate_on_cuda(const Tensor& vertical, const Tensor& slash, const Tensor& q,
                                    const Tensor& k_cache, const Tensor& block_table,
                                    const Tensor& logit_scale, const Tensor& rope_table,
                                    int64_t segment_end, int64_t chunk_size, int64_t local_size,
                                    bool critical) {
  const CudaScope scope("sparse_estimate", q, "q");
  const TensorMatch match("sparse_estimate", scope.device());
  sparse_estimate_cuda(params_of(match, vertical, slash, q, k_cache, block_table, logit_scale,
                                 rope_table, segment_end, chunk_size, local_size, critical),
                       scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("sparse_estimate", TORCH_BOX(&qwen1m::binding::sparse_estimate));
}

#ifdef Q1M_CUDA_SPARSE_ESTIMATE
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("sparse_estimate", TORCH_BOX(&qwen1m::binding::sparse_estimate_on_cuda));
}
#endif
