// Block kernels for AMX. Compiled; tested with software tiles; not run on AMX hardware by this
// project yet.
#include "common/attention/amx_kernel.h"

namespace qwen1m {
namespace {

constexpr BlockKernel kKernels[] = {AmxKernel<HardwareTiles, 16>::describe(CpuIsa::kAmx)};

}  // namespace

/// One width only: its sums run in another order than those of the vector kernels, and a row's bits
/// must not depend on how many rows come with it.
BlockKernels amx_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return {kKernels, 1};
  return {};
}

}  // namespace qwen1m
