// Block kernels for any machine: the baseline instruction set of the compiler (SSE2, NEON, ...).
// Built without special flags.
#include "common/attention/vector_kernel.h"

namespace qwen1m {
namespace {

// 16 architectural registers (SSE2): 8 accumulators, 2 vectors of lanes, a broadcast, a product.
template <typename T>
constexpr BlockKernel kKernels[] = {
    VectorKernel<T, MultiplyFloats<4>, 4, 2, 4>::describe(CpuIsa::kPortable),
};

}  // namespace

BlockKernels portable_kernels(DType dtype) {
  if (dtype == DType::kFloat32) return {kKernels<float>, 1};
  return {kKernels<bf16>, 1};
}

}  // namespace qwen1m
