#include "qwen1m/sample.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

SampleParams params_of(const TensorMatch& match, const Tensor& token_ids,
                       const OptionalTensor& logprobs, const OptionalTensor& history,
                       const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                       const Tensor& top_p, const Tensor& min_p, const OptionalTensor& penalties,
                       const Tensor& seed, const Tensor& position) {
  return {.token_ids = match.typed<int64_t, 1>(token_ids, "token_ids", "[batch]"),
          .logprobs = match.typed<float, 1>(logprobs, "logprobs", "[batch]"),
          .history = match.typed<int32_t, 2>(history, "history", "[batch, vocab]"),
          .logits = match.floats<2>(logits, "logits", "[batch, vocab]"),
          .temperature = match.typed<const float, 1>(temperature, "temperature", "[batch]"),
          .top_k = match.typed<const int64_t, 1>(top_k, "top_k", "[batch]"),
          .top_p = match.typed<const float, 1>(top_p, "top_p", "[batch]"),
          .min_p = match.typed<const float, 1>(min_p, "min_p", "[batch]"),
          .penalties = match.typed<const float, 2>(penalties, "penalties", "[batch, 3]"),
          .seed = match.typed<const int64_t, 1>(seed, "seed", "[batch]"),
          .position = match.typed<const int64_t, 1>(position, "position", "[batch]")};
}

}  // namespace

void sample(const Tensor& token_ids, const OptionalTensor& logprobs, const OptionalTensor& history,
            const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const OptionalTensor& penalties,
            const Tensor& seed, const Tensor& position) {
  sample_cpu(params_of(TensorMatch("sample"), token_ids, logprobs, history, logits, temperature,
                       top_k, top_p, min_p, penalties, seed, position),
             torch_threads());
}

#ifdef Q1M_CUDA_SAMPLE
static void sample_on_cuda(const Tensor& token_ids, const OptionalTensor& logprobs,
                           const OptionalTensor& history, const Tensor& logits,
                           const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                           const Tensor& min_p, const OptionalTensor& penalties, const Tensor& seed,
                           const Tensor& position) {
  const CudaScope scope("sample", logits, "logits");
  sample_cuda(params_of(TensorMatch("sample", scope.device()), token_ids, logprobs, history, logits,
                        temperature, top_k, top_p, min_p, penalties, seed, position),
              scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) { m.impl("sample", TORCH_BOX(&qwen1m::binding::sample)); }

#ifdef Q1M_CUDA_SAMPLE
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("sample", TORCH_BOX(&qwen1m::binding::sample_on_cuda));
}
#endif
