// CUDA backend of sparse_estimate: the same kernels for every architecture from sm_80 on.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/sparse_estimate/sparse_estimate_launch.h"

namespace qwen1m {
namespace {

template <typename Kernel>
struct Entry {
  void (*function)(typename Kernel::Params);
  const char* name;
};

/// A kernel, found by its type.
#define Q1M_ESTIMATE_KERNEL(name, Kernel, min_blocks) \
  Q1M_KERNEL_SM80(name, Kernel, min_blocks)           \
  Entry<Kernel> entry_of(Kernel) { return {name, #name}; }

Q1M_ESTIMATE_KERNEL(sparse_estimate_statistics_d128, EstimateStatisticsSm80<128>, 1)
Q1M_ESTIMATE_KERNEL(sparse_estimate_statistics_d64, EstimateStatisticsSm80<64>, 2)
Q1M_ESTIMATE_KERNEL(sparse_estimate_combine, EstimateCombine, 1)
Q1M_ESTIMATE_KERNEL(sparse_estimate_sums_d128, EstimateSumsSm80<128>, 1)
Q1M_ESTIMATE_KERNEL(sparse_estimate_sums_d64, EstimateSumsSm80<64>, 2)

template <int kHeadDim>
void launch_all(const SparseEstimateParams& p, Stream stream) {
  for_each_launch<kHeadDim>(
      p, [&]<typename Kernel>(Kernel, int64_t blocks, int threads, const SparseEstimateArgs& args) {
        const Entry<Kernel> entry = entry_of(Kernel{});
        arch::launch(entry.function,
                     {.name = entry.name,
                      .blocks = blocks,
                      .threads = threads,
                      .shared_bytes = sizeof(typename Kernel::Smem),
                      .stream = stream},
                     typename Kernel::Params{args});
      });
}

}  // namespace

void sparse_estimate_cuda(const SparseEstimateParams& p, Stream stream) {
  check_sparse_estimate_gpu(p);
  arch::require_sm80("sparse_estimate");
  if (p.q.size(2) == 128) {
    launch_all<128>(p, stream);
  } else {
    launch_all<64>(p, stream);
  }
}

}  // namespace qwen1m
