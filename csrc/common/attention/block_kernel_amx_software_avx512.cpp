// The source of the AMX kernels, AVX-512 parts included, over software tiles; for tests, on
// machines without AMX.
#include "common/attention/amx_kernel.h"

namespace qwen1m {
namespace {

constexpr BlockKernel kKernels[] = {AmxKernel<SoftwareTiles, 16>::describe(CpuIsa::kAvx512)};

}  // namespace

BlockKernels amx_software_avx512_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return {kKernels, 1};
  return {};
}

}  // namespace qwen1m
