// The CUDA key of every op that has no CUDA kernel in this build: a CUDA tensor gets an error that
// says so, instead of torch's "no kernel for the CUDA backend". The build defines Q1M_CUDA when it
// had nvcc, and Q1M_CUDA_<OP> for each op that it has a kernel of.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "qwen1m/error.h"

namespace qwen1m::binding {
namespace {

[[noreturn, maybe_unused]] void fail(const char* op) {
  constexpr const char* kAdvice = "move the tensors to the CPU, or use device=\"cpu\"";
#ifdef Q1M_CUDA
  throw Error(std::string(op) + ": no CUDA kernel exists for it yet; " + kAdvice);
#else
  throw Error(std::string(op) +
              ": qwen1m_ext was built without CUDA: its operators run on CPU tensors only; " +
              kAdvice);
#endif
}

/// A function of the op's own signature, so that the boxing code releases the arguments.
template <typename Op, typename Signature>
struct WithoutCuda;

template <typename Op, typename... Arguments>
struct WithoutCuda<Op, void(Arguments...)> {
  static void call(Arguments...) { fail(Op::name()); }
};

#define Q1M_WITHOUT_CUDA(op)                               \
  struct Op_##op {                                         \
    static const char* name() { return #op; }              \
  };                                                       \
  using Without_##op = WithoutCuda<Op_##op, decltype(op)>; \
  m.impl(#op, TORCH_BOX(&Without_##op::call))

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  (void)m;  // a build may have kernels of them all
#ifndef Q1M_CUDA_EMBEDDING
  Q1M_WITHOUT_CUDA(embedding);
#endif
#ifndef Q1M_CUDA_RMS_NORM
  Q1M_WITHOUT_CUDA(rms_norm);
#endif
#ifndef Q1M_CUDA_SWIGLU
  Q1M_WITHOUT_CUDA(swiglu);
#endif
#ifndef Q1M_CUDA_QKV_ROPE_APPEND
  Q1M_WITHOUT_CUDA(qkv_rope_append);
#endif
#ifndef Q1M_CUDA_WIDEN_PAGES
  Q1M_WITHOUT_CUDA(widen_pages);
#endif
#ifndef Q1M_CUDA_SAMPLE
  Q1M_WITHOUT_CUDA(sample);
#endif
#ifndef Q1M_CUDA_PREFILL_ATTENTION
  Q1M_WITHOUT_CUDA(prefill_attention);
#endif
#ifndef Q1M_CUDA_DECODE_ATTENTION
  Q1M_WITHOUT_CUDA(decode_attention);
#endif
#ifndef Q1M_CUDA_SPARSE_ESTIMATE
  Q1M_WITHOUT_CUDA(sparse_estimate);
#endif
#ifndef Q1M_CUDA_SPARSE_PLAN
  Q1M_WITHOUT_CUDA(sparse_plan);
#endif
#ifndef Q1M_CUDA_SPARSE_PREFILL
  Q1M_WITHOUT_CUDA(sparse_prefill);
#endif
}

}  // namespace
}  // namespace qwen1m::binding
