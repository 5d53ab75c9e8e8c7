#include "qwen1m/embedding.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

EmbeddingParams params_of(const TensorMatch& match, const Tensor& out, const Tensor& weight,
                          const Tensor& token_ids) {
  return {.out = match.floats<2>(out, "out", "[tokens, hidden]"),
          .weight = match.floats<2>(weight, "weight", "[vocab, hidden]"),
          .token_ids = match.typed<const int64_t, 1>(token_ids, "token_ids", "[tokens]")};
}

}  // namespace

void embedding(const Tensor& out, const Tensor& weight, const Tensor& token_ids) {
  embedding_cpu(params_of(TensorMatch("embedding"), out, weight, token_ids), torch_threads());
}

#ifdef Q1M_CUDA_EMBEDDING
static void embedding_on_cuda(const Tensor& out, const Tensor& weight, const Tensor& token_ids) {
  const CudaScope scope("embedding", out, "out");
  const TensorMatch match("embedding", scope.device());
  embedding_cuda(params_of(match, out, weight, token_ids), scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("embedding", TORCH_BOX(&qwen1m::binding::embedding));
}

#ifdef Q1M_CUDA_EMBEDDING
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("embedding", TORCH_BOX(&qwen1m::binding::embedding_on_cuda));
}
#endif
