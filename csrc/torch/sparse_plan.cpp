#include "qwen1m/sparse_plan.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {

namespace {

SparsePlanParams params_of(const TensorMatch& match, const Tensor& verticals,
                           const Tensor& vertical_count, const Tensor& runs,
                           const Tensor& run_count, const Tensor& vertical_score,
                           const Tensor& slash_score, const Tensor& v_size, const Tensor& s_size,
                           int64_t segment_begin, int64_t chunk_size, int64_t local_size,
                           int64_t tile_tokens, int64_t group, bool exact, bool fallback) {
  constexpr const char* kScores = "[q_heads, segment_end]";
  return {
      .verticals = match.typed<int32_t, 2>(verticals, "verticals", "[q_heads, capacity]"),
      .vertical_count = match.typed<int32_t, 2>(vertical_count, "vertical_count", "[q_heads, 3]"),
      .runs = match.typed<int32_t, 4>(runs, "runs", "[q_heads, 3, capacity, 2]"),
      .run_count = match.typed<int32_t, 2>(run_count, "run_count", "[q_heads, 3]"),
      .vertical_score = match.typed<const float, 2>(vertical_score, "vertical_score", kScores),
      .slash_score = match.typed<const float, 2>(slash_score, "slash_score", kScores),
      .v_size = match.typed<const int64_t, 1>(v_size, "v_size", "[q_heads]"),
      .s_size = match.typed<const int64_t, 1>(s_size, "s_size", "[q_heads]"),
      .segment_begin = segment_begin,
      .dual_chunk = {.chunk_size = chunk_size, .local_size = local_size},
      .tile_tokens = tile_tokens,
      .group = group,
      .exact = exact,
      .fallback = fallback};
}

}  // namespace

void sparse_plan(const Tensor& verticals, const Tensor& vertical_count, const Tensor& runs,
                 const Tensor& run_count, const Tensor& vertical_score, const Tensor& slash_score,
                 const Tensor& v_size, const Tensor& s_size, int64_t segment_begin,
                 int64_t chunk_size, int64_t local_size, int64_t tile_tokens, int64_t group,
                 bool exact, bool fallback) {
  const TensorMatch match("sparse_plan");
  sparse_plan_cpu(params_of(match, verticals, vertical_count, runs, run_count, vertical_score,
                            slash_score, v_size, s_size, segment_begin, chunk_size, local_size,
                            tile_tokens, group, exact, fallback),
                  torch_threads());
}

#ifdef Q1M_CUDA_SPARSE_PLAN
static void sparse_plan_on_cuda(const Tensor& verticals, const Tensor& vertical_count,
                                const Tensor& runs, const Tensor& run_count,
                                const Tensor& vertical_score, const Tensor& slash_score,
                                const Tensor& v_size, const Tensor& s_size, int64_t segment_begin,
                                int64_t chunk_size, int64_t local_size, int64_t tile_tokens,
                                int64_t group, bool exact, bool fallback) {
  const CudaScope scope("sparse_plan", vertical_score, "vertical_score");
  const TensorMatch match("sparse_plan", scope.device());
  sparse_plan_cuda(params_of(match, verticals, vertical_count, runs, run_count, vertical_score,
                             slash_score, v_size, s_size, segment_begin, chunk_size, local_size,
                             tile_tokens, group, exact, fallback),
                   scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("sparse_plan", TORCH_BOX(&qwen1m::binding::sparse_plan));
}

#ifdef Q1M_CUDA_SPARSE_PLAN
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("sparse_plan", TORCH_BOX(&qwen1m::binding::sparse_plan_on_cuda));
}
#endif
