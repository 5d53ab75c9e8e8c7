// CUDA backend of widen_pages.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/widen_pages/widen_pages_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(widen_pages_kernel, WidenPagesKernel, 1)

}  // namespace

void widen_pages_cuda(const WidenPagesParams& args, Stream stream) {
  check_widen_pages_gpu(args);
  using Kernel = WidenPagesKernel;
  arch::launch_after_prior_grid<Kernel>(widen_pages_kernel, "widen_pages_kernel",
                                        Kernel::params_of(args), stream);
}

}  // namespace qwen1m
