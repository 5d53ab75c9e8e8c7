#include "qwen1m/swiglu.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

SwigluParams params_of(const TensorMatch& match, const Tensor& out, const Tensor& gate_up) {
  return {.out = match.floats<2>(out, "out", "[tokens, intermediate]"),
          .gate_up = match.floats<2>(gate_up, "gate_up", "[tokens, 2 intermediate]")};
}

}  // namespace

void swiglu(const Tensor& out, const Tensor& gate_up) {
  swiglu_cpu(params_of(TensorMatch("swiglu"), out, gate_up), torch_threads());
}

#ifdef Q1M_CUDA_SWIGLU
static void swiglu_on_cuda(const Tensor& out, const Tensor& gate_up) {
  const CudaScope scope("swiglu", out, "out");
  swiglu_cuda(params_of(TensorMatch("swiglu", scope.device()), out, gate_up), scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) { m.impl("swiglu", TORCH_BOX(&qwen1m::binding::swiglu)); }

#ifdef Q1M_CUDA_SWIGLU
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&qwen1m::binding::swiglu_on_cuda));
}
#endif
