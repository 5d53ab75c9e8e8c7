#include "qwen1m/widen_pages.h"

#include <torch/csrc/stable/library.h>

#include "cuda_scope.h"
#include "ops.h"
#include "tensor_match.h"
#include "torch_threads.h"

namespace qwen1m::binding {
namespace {

WidenPagesParams params_of(const TensorMatch& match, const Tensor& wide, const Tensor& codes,
                           const Tensor& scale, const Tensor& pages) {
  return {.wide = match.floats<4>(wide, "wide", "[pages, kv_heads, 128, D]"),
          .codes = match.cache<4>(codes, "codes", "[pages, kv_heads, 128, D]"),
          .scale = match.typed<const float, 1>(scale, "scale", "[kv_heads]"),
          .pages = match.typed<const int64_t, 1>(pages, "pages", "[n]")};
}

}  // namespace

void widen_pages(const Tensor& wide, const Tensor& codes, const Tensor& scale,
                 const Tensor& pages) {
  widen_pages_cpu(params_of(TensorMatch("widen_pages"), wide, codes, scale, pages),
                  torch_threads());
}

#ifdef Q1M_CUDA_WIDEN_PAGES
static void widen_pages_on_cuda(const Tensor& wide, const Tensor& codes, const Tensor& scale,
                                const Tensor& pages) {
  const CudaScope scope("widen_pages", wide, "wide");
  const TensorMatch match("widen_pages", scope.device());
  widen_pages_cuda(params_of(match, wide, codes, scale, pages), scope.stream());
}
#endif

}  // namespace qwen1m::binding

STABLE_TORCH_LIBRARY_IMPL(qwen1m, CPU, m) {
  m.impl("widen_pages", TORCH_BOX(&qwen1m::binding::widen_pages));
}

#ifdef Q1M_CUDA_WIDEN_PAGES
STABLE_TORCH_LIBRARY_IMPL(qwen1m, CUDA, m) {
  m.impl("widen_pages", TORCH_BOX(&qwen1m::binding::widen_pages_on_cuda));
}
#endif
