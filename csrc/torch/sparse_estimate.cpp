#include "qwen1m/sparse_estimate.h"

#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {

void sparse_estimate(const Tensor& vertical, const Tensor& slash, const Tensor& q,
                     const Tensor& k_cache, const Tensor& block_table, const Tensor& logit_scale,
                     const Tensor& rope_table, int64_t segment_end, int64_t chunk_size,
                     int64_t local_size, bool critical) {
  const TensorMatch match("sparse_estimate");
  sparse_estimate_cpu(
      {.vertical = match.typed<float, 2>(vertical, "vertical", "[q_heads, segment_end]"),
       .slash = match.typed<float, 2>(slash, "slash", "[q_heads, segment_end]"),
       .q = match.floats<3>(q, "q", "[n, q_heads, D]"),
       .k_cache = match.floats<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
       .block_table = match.typed<const int32_t, 2>(block_table, "block_table", "[1, max_pages]"),
       .logit_scale = match.typed<const float, 1>(logit_scale, "logit_scale", "[1]"),
       .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
       .segment_end = segment_end,
       .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size},
       .critical = critical},
      torch_threads());
}

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("sparse_estimate", TORCH_BOX(&qwen1m::binding::sparse_estimate));
}
