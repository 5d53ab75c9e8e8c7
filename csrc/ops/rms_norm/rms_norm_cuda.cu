// CUDA backend of rms_norm.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/rms_norm/rms_norm_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(rms_norm_kernel, RmsNormKernel, 1)

}  // namespace

void rms_norm_cuda(const RmsNormParams& args, Stream stream) {
  check_rms_norm_gpu(args);
  using Kernel = RmsNormKernel;
  arch::launch_after_prior_grid<Kernel>(rms_norm_kernel, "rms_norm_kernel", Kernel::params_of(args),
                                        stream);
}

}  // namespace qwen1m
