// prefill_attention's GPU kernels under the emulator: for tests (tests/lib/emulator.py).
#include <string>

#include "common/emulated_call.h"
#include "ops/prefill_attention/prefill_attention_launch.h"

namespace qwen1m {
namespace {

template <typename Kernel>
arch::emu::Report emulate(const PrefillAttentionParams& p, const typename Kernel::Params& params,
                          const arch::emu::Options& options) {
  return arch::emu::launch(
      {.blocks = max_tiles(p),
       .threads = Kernel::kThreads,
       .shared_bytes = sizeof(typename Kernel::Smem)},
      [&] { Kernel::run(params); }, options);
}

template <int kHeadDim>
arch::emu::Report emulate(int architecture, const PrefillAttentionParams& p,
                          const arch::emu::Options& options) {
  if (architecture == 80) return emulate<PrefillAttentionSm80<kHeadDim>>(p, {p}, options);
  return emulate<PrefillAttentionSm90<kHeadDim>>(
      p,
      {p, arch::emu::make_tensor_map(page_map(p.k_cache)),
       arch::emu::make_tensor_map(page_map(p.v_cache))},
      options);
}

}  // namespace

/// Arguments: out, lse (data may be null), q, k_cache, v_cache, block_table, cu_q, kv_len,
/// logit_scale, rope_table. See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_prefill_attention(const EmulatedTensor* tensors,
                                                   int64_t chunk_size, int64_t local_size,
                                                   const EmulatedCall* call) {
  return run_emulated(*call, tensors, 10, {0, 1}, [&](const arch::emu::Options& options) {
    const PrefillAttentionParams p{.out = tensors[0].any<3>(),
                                   .lse = tensors[1].typed<float, 2>(),
                                   .q = tensors[2].any<3>(),
                                   .k_cache = tensors[3].any<4>(),
                                   .v_cache = tensors[4].any<4>(),
                                   .block_table = tensors[5].typed<const int32_t, 2>(),
                                   .cu_q = tensors[6].typed<const int64_t, 1>(),
                                   .kv_len = tensors[7].typed<const int64_t, 1>(),
                                   .logit_scale = tensors[8].typed<const float, 1>(),
                                   .rope_table = tensors[9].typed<const float, 3>(),
                                   .dual_chunk = {chunk_size, local_size}};
    check_attention(p);  // the data lie on the host here, so that values are checked too
    check_prefill_attention_gpu(p);
    if (p.q.size(0) == 0) {  // as the CUDA backend does
      arch::emu::Report nothing_to_do;
      nothing_to_do.completed = true;
      return nothing_to_do;
    }
    return p.q.size(2) == 128 ? emulate<128>(call->architecture, p, options)
                              : emulate<64>(call->architecture, p, options);
  });
}

}  // namespace qwen1m
