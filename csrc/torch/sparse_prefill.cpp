#include "qwen1m/sparse_prefill.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

SparsePrefillParams params_of(const TensorMatch& match, const Tensor& out,
                              const OptionalTensor& lse, const Tensor& q, const Tensor& k_cache,
                              const Tensor& v_cache, const Tensor& block_table,
                              const Tensor& logit_scale, const Tensor& rope_table,
                              const Tensor& verticals, const Tensor& vertical_count,
                              const Tensor& runs, const Tensor& run_count,
                              const OptionalTensor& scratch, int64_t q_begin, int64_t segment_begin,
                              int64_t segment_end, int64_t chunk_size, int64_t local_size,
                              int64_t tile_tokens, bool exact) {
  return {
      .out = match.floats<3>(out, "out", "[tokens, q_heads, D]"),
      .lse = match.typed<float, 2>(lse, "lse", "[tokens, q_heads]"),
      .q = match.floats<3>(q, "q", "[tokens, q_heads, D]"),
      .k_cache = match.floats<4>(k_cache, "k_cache", "[pages, kv_heads, 128, D]"),
      .v_cache = match.floats<4>(v_cache, "v_cache", "[pages, kv_heads, 128, D]"),
      .block_table = match.typed<const int32_t, 2>(block_table, "block_table", "[1, max_pages]"),
      .logit_scale = match.typed<const float, 1>(logit_scale, "logit_scale", "[1]"),
      .rope_table = match.typed<const float, 3>(rope_table, "rope_table", "[rows, D/2, 2]"),
      .verticals = match.typed<const int32_t, 2>(verticals, "verticals", "[q_heads, capacity]"),
      .vertical_count =
          match.typed<const int32_t, 2>(vertical_count, "vertical_count", "[q_heads, 3]"),
      .runs = match.typed<const int32_t, 4>(runs, "runs", "[q_heads, 3, capacity, 2]"),
      .run_count = match.typed<const int32_t, 2>(run_count, "run_count", "[q_heads, 3]"),
      .scratch = match.floats<4>(scratch, "scratch", "[2, q_heads, capacity + 1, D]"),
      .q_begin = q_begin,
      .segment_begin = segment_begin,
      .segment_end = segment_end,
      .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size},
      .tile_tokens = tile_tokens,
      .exact = exact};
}

}  // namespace

void sparse_prefill(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                    const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                    const Tensor& logit_scale, const Tensor& rope_table, const Tensor& verticals,
                    const Tensor& vertical_count, const Tensor& runs, const Tensor& run_count,
                    const OptionalTensor& scratch, int64_t q_begin, int64_t segment_begin,
                    int64_t segment_end, int64_t chunk_size, int64_t local_size,
                    int64_t tile_tokens, bool exact) {
  const TensorMatch match("sparse_prefill");
  sparse_prefill_cpu(
      params_of(match, out, lse, q, k_cache, v_cache, block_table, logit_scale, rope_table,
                verticals, vertical_count, runs, run_count, scratch, q_begin, segment_begin,
                segment_end, chunk_size, local_size, tile_tokens, exact),
      torch_threads());
}

#ifdef Q1M_CUDA_SPARSE_PREFILL
static void sparse_prefill_on_cuda(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                                   const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& block_table, const Tensor& logit_scale,
                                   const Tensor& rope_table, const Tensor& verticals,
                                   const Tensor& vertical_count, const Tensor& runs,
                                   const Tensor& run_count, const OptionalTensor& scratch,
                                   int64_t q_begin, int64_t segment_begin, int64_t segment_end,
                                   int64_t chunk_size, int64_t local_size, int64_t tile_tokens,
                                   bool exact) {
  const CudaScope scope("sparse_prefill", q, "q");
  const TensorMatch match("sparse_prefill", scope.device());
  sparse_prefill_cuda(
      params_of(match, out, lse, q, k_cache, v_cache, block_table, logit_scale, rope_table,
                verticals, vertical_count, runs, run_count, scratch, q_begin, segment_begin,
                segment_end, chunk_size, local_size, tile_tokens, exact),
      scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("sparse_prefill", TORCH_BOX(&qwen1m::binding::sparse_prefill));
}

#ifdef Q1M_CUDA_SPARSE_PREFILL
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("sparse_prefill", TORCH_BOX(&qwen1m::binding::sparse_prefill_on_cuda));
}
#endif
