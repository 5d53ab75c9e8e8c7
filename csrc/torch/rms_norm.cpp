#include "qwen1m/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {

void rms_norm(const Tensor& out, const OptionalTensor& residual, const Tensor& x,
              const Tensor& weight, double eps) {
  const TensorMatch match("rms_norm");
  rms_norm_cpu({.out = match.floats<2>(out, "out", "[tokens, hidden]"),
                .residual = match.floats<2>(residual, "residual", "[tokens, hidden]"),
                .x = match.floats<2>(x, "x", "[tokens, hidden]"),
                .weight = match.floats<1>(weight, "weight", "[hidden]"),
                .eps = static_cast<float>(eps)},
               torch_threads());
}

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&qwen1m::binding::rms_norm));
}
