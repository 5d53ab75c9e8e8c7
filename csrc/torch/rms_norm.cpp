#include "qwen1m/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

RmsNormParams params_of(const TensorMatch& match, const Tensor& out, const OptionalTensor& residual,
                        const Tensor& x, const Tensor& weight, double eps) {
  return {.out = match.floats<2>(out, "out", "[tokens, hidden]"),
          .residual = match.floats<2>(residual, "residual", "[tokens, hidden]"),
          .x = match.floats<2>(x, "x", "[tokens, hidden]"),
          .weight = match.floats<1>(weight, "weight", "[hidden]"),
          .eps = static_cast<float>(eps)};
}

}  // namespace

void rms_norm(const Tensor& out, const OptionalTensor& residual, const Tensor& x,
              const Tensor& weight, double eps) {
  rms_norm_cpu(params_of(TensorMatch("rms_norm"), out, residual, x, weight, eps), torch_threads());
}

#ifdef Q1M_CUDA_RMS_NORM
static void rms_norm_on_cuda(const Tensor& out, const OptionalTensor& residual, const Tensor& x,
                             const Tensor& weight, double eps) {
  const CudaScope scope("rms_norm", out, "out");
  const TensorMatch match("rms_norm", scope.device());
  rms_norm_cuda(params_of(match, out, residual, x, weight, eps), scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&qwen1m::binding::rms_norm));
}

#ifdef Q1M_CUDA_RMS_NORM
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&qwen1m::binding::rms_norm_on_cuda));
}
#endif
