// CUDA backend of sparse_prefill: gathers the verticals, then chooses the kernel and launches it.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/sparse_prefill/sparse_prefill_launch.h"

namespace qwen1m {
namespace {

template <int kHeadDim>
using SparsePairSm90 = SparsePrefillSm90<kHeadDim, 2>;

Q1M_KERNEL_SM80(sparse_prefill_gather, SparseGather, 8)
Q1M_KERNEL_SM90(sparse_prefill_sm90_d128, SparsePrefillSm90<128>, 1)
Q1M_KERNEL_SM90(sparse_prefill_sm90_d64, SparsePrefillSm90<64>, 1)
Q1M_KERNEL_SM90(sparse_prefill_sm90_d128_pair, SparsePairSm90<128>, 1)
Q1M_KERNEL_SM90(sparse_prefill_sm90_d64_pair, SparsePairSm90<64>, 1)
Q1M_KERNEL_SM80(sparse_prefill_sm80_d128, SparsePrefillSm80<128>, 2)
Q1M_KERNEL_SM80(sparse_prefill_sm80_d64, SparsePrefillSm80<64>, 2)

template <typename Kernel>
void launch(void (*kernel)(typename Kernel::Params), const char* name,
            const typename Kernel::Params& params, Stream stream) {
  arch::launch(kernel,
               {.name = name,
                .blocks = Kernel::num_blocks(params.args),
                .threads = Kernel::kThreads,
                .shared_bytes = sizeof(typename Kernel::Smem),
                .cluster = Kernel::kCluster,
                .stream = stream},
               params);
}

#define Q1M_LAUNCH(Kernel, name, ...) launch<Kernel>(name, #name, {__VA_ARGS__}, stream)

}  // namespace

void sparse_prefill_cuda(const SparsePrefillParams& p, Stream stream) {
  check_sparse_prefill_gpu(p);
  if (p.q.size(0) == 0) return;
  const bool wide = p.q.size(2) == 128;
  const int architecture = arch::kernel_architecture("sparse_prefill");
  Q1M_LAUNCH(SparseGather, sparse_prefill_gather, p);
  if (architecture == 90) {
    const arch::TensorMap k = arch::make_tensor_map(half_page_map(p.k_cache));
    const arch::TensorMap v = arch::make_tensor_map(half_page_map(p.v_cache));
    const arch::TensorMap verticals = arch::make_tensor_map(vertical_map(p));
    if (p.tile_tokens == SparsePairSm90<128>::kClusterRows) {
      if (wide) {
        Q1M_LAUNCH(SparsePairSm90<128>, sparse_prefill_sm90_d128_pair, p, k, v, verticals);
      } else {
        Q1M_LAUNCH(SparsePairSm90<64>, sparse_prefill_sm90_d64_pair, p, k, v, verticals);
      }
    } else if (wide) {
      Q1M_LAUNCH(SparsePrefillSm90<128>, sparse_prefill_sm90_d128, p, k, v, verticals);
    } else {
      Q1M_LAUNCH(SparsePrefillSm90<64>, sparse_prefill_sm90_d64, p, k, v, verticals);
    }
  } else if (wide) {
    Q1M_LAUNCH(SparsePrefillSm80<128>, sparse_prefill_sm80_d128, p);
  } else {
    Q1M_LAUNCH(SparsePrefillSm80<64>, sparse_prefill_sm80_d64, p);
  }
}

}  // namespace qwen1m
