#include "qwen1m/swiglu.h"

#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {

void swiglu(const Tensor& out, const Tensor& gate_up) {
  const TensorMatch match("swiglu");
  swiglu_cpu({.out = match.floats<2>(out, "out", "[tokens, intermediate]"),
              .gate_up = match.floats<2>(gate_up, "gate_up", "[tokens, 2 intermediate]")},
             torch_threads());
}

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) { m.impl("swiglu", TORCH_BOX(&qwen1m::binding::swiglu)); }
