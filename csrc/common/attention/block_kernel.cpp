#include "common/attention/block_kernel.h"

namespace qwen1m {

BlockKernels prefill_kernels(CpuIsa isa, DType dtype) {
  BlockKernels kernels;
#if Q1M_HAVE_AMX
  if (isa >= CpuIsa::kAmx) kernels = amx_kernels(dtype);
#endif
#if Q1M_HAVE_AVX512BF16
  if (kernels.count == 0 && isa >= CpuIsa::kAvx512Bf16) kernels = avx512_bf16_kernels(dtype);
#endif
#if Q1M_HAVE_AVX512
  if (kernels.count == 0 && isa >= CpuIsa::kAvx512) kernels = avx512_kernels(dtype);
#endif
  if (kernels.count == 0) kernels = portable_kernels(dtype);
  return kernels;
}

/// No AMX: decode waits for memory already.
BlockKernels decode_kernels(CpuIsa isa, DType dtype) {
  BlockKernels kernels;
#if Q1M_HAVE_AVX512BF16
  if (isa >= CpuIsa::kAvx512Bf16) kernels = avx512_bf16_decode_kernels(dtype);
#endif
#if Q1M_HAVE_AVX512
  if (kernels.count == 0 && isa >= CpuIsa::kAvx512) kernels = avx512_decode_kernels(dtype);
#endif
  if (kernels.count == 0) kernels = portable_kernels(dtype);
  return kernels;
}

bool may_take_several_blocks(const BlockKernel& kernel) { return kernel.lanes >= 32; }

const BlockKernel& choose_lanes(BlockKernels kernels, int64_t rows) {
  const auto lanes = [&](const BlockKernel& k) { return (rows + k.lanes - 1) / k.lanes * k.lanes; };
  const BlockKernel* best = kernels.begin();
  for (const BlockKernel& kernel : kernels) {
    if (kernel.lanes < rows && !may_take_several_blocks(kernel)) continue;
    if (lanes(kernel) < lanes(*best)) best = &kernel;
  }
  return *best;
}

}  // namespace qwen1m
