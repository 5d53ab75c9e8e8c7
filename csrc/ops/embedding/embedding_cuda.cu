// CUDA backend of embedding.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/embedding/embedding_kernel.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(embedding_kernel, EmbeddingKernel, 1)

}  // namespace

void embedding_cuda(const EmbeddingParams& args, Stream stream) {
  check_embedding_gpu(args);
  using Kernel = EmbeddingKernel;
  arch::launch_after_prior_grid<Kernel>(embedding_kernel, "embedding_kernel",
                                        Kernel::params_of(args), stream);
}

}  // namespace qwen1m
