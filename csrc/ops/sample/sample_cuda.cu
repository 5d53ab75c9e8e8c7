// CUDA backend of sample.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/sample/sample_kernel.cuh"

namespace qwen1m {
namespace {

using Sm90Fp32 = SampleKernel<float, 8>;
using Sm90Bf16 = SampleKernel<bf16, 8>;
using Sm80Fp32 = SampleKernel<float, 1>;
using Sm80Bf16 = SampleKernel<bf16, 1>;
Q1M_KERNEL_SM90(sample_kernel_sm90_fp32, Sm90Fp32, 1)
Q1M_KERNEL_SM90(sample_kernel_sm90_bf16, Sm90Bf16, 1)
Q1M_KERNEL_SM80(sample_kernel_sm80_fp32, Sm80Fp32, 1)
Q1M_KERNEL_SM80(sample_kernel_sm80_bf16, Sm80Bf16, 1)

#define Q1M_LAUNCH(Kernel, name) arch::launch_after_prior_grid<Kernel>(name, #name, {args}, stream)

}  // namespace

void sample_cuda(const SampleParams& args, Stream stream) {
  check_sample_gpu(args);
  const bool sm90 = arch::kernel_architecture("sample") == 90;
  if (args.logits.dtype == DType::kFloat32) {
    sm90 ? Q1M_LAUNCH(Sm90Fp32, sample_kernel_sm90_fp32)
         : Q1M_LAUNCH(Sm80Fp32, sample_kernel_sm80_fp32);
  } else {
    sm90 ? Q1M_LAUNCH(Sm90Bf16, sample_kernel_sm90_bf16)
         : Q1M_LAUNCH(Sm80Bf16, sample_kernel_sm80_bf16);
  }
}

}  // namespace qwen1m
