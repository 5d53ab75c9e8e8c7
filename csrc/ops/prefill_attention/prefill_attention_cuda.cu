// CUDA backend of prefill_attention: chooses the kernel and launches it.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/prefill_attention/prefill_attention_launch.h"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM90(prefill_attention_sm90_d128, PrefillAttentionSm90<128>, 1)
Q1M_KERNEL_SM90(prefill_attention_sm90_d64, PrefillAttentionSm90<64>, 1)
Q1M_KERNEL_SM80(prefill_attention_sm80_d128, PrefillAttentionSm80<128>, 2)
Q1M_KERNEL_SM80(prefill_attention_sm80_d64, PrefillAttentionSm80<64>, 2)

template <typename Kernel>
arch::LaunchConfig config(const char* name, const PrefillAttentionParams& p, Stream stream) {
  return {.name = name,
          .blocks = max_tiles(p),
          .threads = Kernel::kThreads,
          .shared_bytes = sizeof(typename Kernel::Smem),
          .stream = stream};
}

}  // namespace

void prefill_attention_cuda(const PrefillAttentionParams& p, Stream stream) {
  check_prefill_attention_gpu(p);
  if (p.q.size(0) == 0) return;
  const bool wide = p.q.size(2) == 128;
  if (arch::kernel_architecture("prefill_attention") == 90) {
    const arch::TensorMap k_map = arch::make_tensor_map(page_map(p.k_cache));
    const arch::TensorMap v_map = arch::make_tensor_map(page_map(p.v_cache));
    if (wide) {
      using Kernel = PrefillAttentionSm90<128>;
      arch::launch(prefill_attention_sm90_d128,
                   config<Kernel>("prefill_attention_sm90_d128", p, stream),
                   Kernel::Params{p, k_map, v_map});
    } else {
      using Kernel = PrefillAttentionSm90<64>;
      arch::launch(prefill_attention_sm90_d64,
                   config<Kernel>("prefill_attention_sm90_d64", p, stream),
                   Kernel::Params{p, k_map, v_map});
    }
  } else if (wide) {
    using Kernel = PrefillAttentionSm80<128>;
    arch::launch(prefill_attention_sm80_d128,
                 config<Kernel>("prefill_attention_sm80_d128", p, stream), Kernel::Params{p});
  } else {
    using Kernel = PrefillAttentionSm80<64>;
    arch::launch(prefill_attention_sm80_d64,
                 config<Kernel>("prefill_attention_sm80_d64", p, stream), Kernel::Params{p});
  }
}

}  // namespace qwen1m
