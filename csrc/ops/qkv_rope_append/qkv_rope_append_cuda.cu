// CUDA backend of qkv_rope_append.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/qkv_rope_append/qkv_rope_append_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(qkv_rope_append_kernel, QkvRopeAppendKernel<bf16>, 1)
Q1M_KERNEL_SM80(qkv_rope_append_kernel_fp8, QkvRopeAppendKernel<e4m3>, 1)

template <typename Kernel>
void launch(void (*kernel)(typename Kernel::Params), const char* name,
            const QkvRopeAppendParams& args, Stream stream) {
  arch::launch_after_prior_grid<Kernel>(kernel, name, Kernel::params_of(args), stream);
}

}  // namespace

void qkv_rope_append_cuda(const QkvRopeAppendParams& args, Stream stream) {
  check_qkv_rope_append_gpu(args);
  if (args.k_scale) {
    launch<QkvRopeAppendKernel<e4m3>>(qkv_rope_append_kernel_fp8, "qkv_rope_append_kernel_fp8",
                                      args, stream);
  } else {
    launch<QkvRopeAppendKernel<bf16>>(qkv_rope_append_kernel, "qkv_rope_append_kernel", args,
                                      stream);
  }
}

}  // namespace qwen1m
