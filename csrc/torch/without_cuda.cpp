// The CUDA key of every op in a build without CUDA: a CUDA tensor gets an error that says so,
// instead of torch's "no kernel for the CUDA backend".
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "qwen1m/error.h"

namespace qwen1m::binding {
namespace {

/// A function of the op's own signature, so that the boxing code releases the arguments.
template <typename Signature>
struct WithoutCuda;

template <typename... Arguments>
struct WithoutCuda<void(Arguments...)> {
  static void call(Arguments...) {
    throw Error(
        "qwen1m_ext was built without CUDA: its operators run on CPU tensors only; "
        "move the tensors to the CPU, or use device=\"cpu\"");
  }
};

#define Q1M_WITHOUT_CUDA(op) m.impl(#op, TORCH_BOX(&WithoutCuda<decltype(op)>::call))

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  Q1M_WITHOUT_CUDA(rms_norm);
  Q1M_WITHOUT_CUDA(swiglu);
  Q1M_WITHOUT_CUDA(qkv_rope_append);
  Q1M_WITHOUT_CUDA(prefill_attention);
  Q1M_WITHOUT_CUDA(decode_attention);
}

}  // namespace
}  // namespace qwen1m::binding
