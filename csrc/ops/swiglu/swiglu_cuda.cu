// CUDA backend of swiglu.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/swiglu/swiglu_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(swiglu_kernel, SwigluKernel, 1)

}  // namespace

void swiglu_cuda(const SwigluParams& args, Stream stream) {
  check_swiglu_gpu(args);
  using Kernel = SwigluKernel;
  arch::launch_after_prior_grid<Kernel>(swiglu_kernel, "swiglu_kernel", Kernel::params_of(args),
                                        stream);
}

}  // namespace qwen1m
