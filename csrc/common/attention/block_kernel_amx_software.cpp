// The source of the AMX kernels over software tiles; for tests, on any machine.
// Built without special flags.
#include "common/attention/amx_kernel.h"

namespace qwen1m {
namespace {

constexpr BlockKernel kKernels[] = {AmxKernel<SoftwareTiles, 4>::describe(CpuIsa::kPortable)};

}  // namespace

BlockKernels amx_software_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return {kKernels, 1};
  return {};
}

}  // namespace qwen1m
