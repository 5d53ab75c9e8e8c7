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

const BlockKernel& choose_lanes(BlockKernels kernels, int64_t rows) {
  const BlockKernel* best = kernels.begin();
  for (const BlockKernel& kernel : kernels) {
    if (kernel.lanes >= rows && kernel.lanes < best->lanes) best = &kernel;
  }
  return *best;
}

}  // namespace qwen1m
