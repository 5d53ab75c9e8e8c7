// CUDA backend of qkv_rope_append.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/qkv_rope_append/qkv_rope_append_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(qkv_rope_append_kernel, QkvRopeAppendKernel, 1)

}  // namespace

void qkv_rope_append_cuda(const QkvRopeAppendParams& args, Stream stream) {
  check_qkv_rope_append_gpu(args);
  using Kernel = QkvRopeAppendKernel;
  arch::launch_after_prior_grid<Kernel>(qkv_rope_append_kernel, "qkv_rope_append_kernel",
                                        Kernel::params_of(args), stream);
}

}  // namespace qwen1m
