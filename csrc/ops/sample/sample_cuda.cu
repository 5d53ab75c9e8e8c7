// CUDA backend of sample.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/sample/sample_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(sample_kernel_fp32, SampleKernel<float>, 1)
Q1M_KERNEL_SM80(sample_kernel_bf16, SampleKernel<bf16>, 1)

}  // namespace

void sample_cuda(const SampleParams& args, Stream stream) {
  check_sample_gpu(args);
  if (args.logits.dtype == DType::kFloat32) {
    arch::launch_after_prior_grid<SampleKernel<float>>(sample_kernel_fp32, "sample_kernel_fp32",
                                                       {args}, stream);
  } else {
    arch::launch_after_prior_grid<SampleKernel<bf16>>(sample_kernel_bf16, "sample_kernel_bf16",
                                                      {args}, stream);
  }
}

}  // namespace qwen1m
