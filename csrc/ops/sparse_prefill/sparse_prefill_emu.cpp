// sparse_prefill's GPU kernels under the emulator: for tests (tests/lib/emulator.py).
#include <string>
#include <type_traits>

#include "common/emulated_call.h"
#include "ops/sparse_prefill/sparse_prefill_launch.h"

namespace qwen1m {
namespace {

template <typename Kernel>
arch::emu::Report emulate(const typename Kernel::Params& params,
                          const arch::emu::Options& options) {
  return arch::emu::launch(
      {.blocks = Kernel::num_blocks(params.args),
       .threads = Kernel::kThreads,
       .cluster_size = Kernel::kCluster,
       .shared_bytes = sizeof(typename Kernel::Smem)},
      [&] { Kernel::run(params); }, options);
}

template <int kHeadDim>
arch::emu::Report emulate(int64_t architecture, const SparsePrefillParams& p,
                          const arch::emu::Options& options) {
  const arch::emu::Report gathered = emulate<SparseGather>({p}, options);
  if (!gathered.ok()) return gathered;
  if (architecture == 80) return emulate<SparsePrefillSm80<kHeadDim>>({p}, options);
  const auto sm90 = [&]<int kCluster>(std::integral_constant<int, kCluster>) {
    return emulate<SparsePrefillSm90<kHeadDim, kCluster>>(
        {p, arch::emu::make_tensor_map(half_page_map(p.k_cache)),
         arch::emu::make_tensor_map(half_page_map(p.v_cache)),
         arch::emu::make_tensor_map(vertical_map(p))},
        options);
  };
  return p.tile_tokens == 256 ? sm90(std::integral_constant<int, 2>{})
                              : sm90(std::integral_constant<int, 1>{});
}

}  // namespace

/// Arguments: those of the op, tensors first (lse may be null). See emulated_call.h for the rest
/// and the result.
Q1M_EMULATED_CALL int qwen1m_emu_sparse_prefill(const EmulatedTensor* tensors, int64_t q_begin,
                                                int64_t segment_begin, int64_t segment_end,
                                                int64_t chunk_size, int64_t local_size,
                                                int64_t tile_tokens, int64_t exact,
                                                const EmulatedCall* call) {
  return run_emulated(*call, tensors, 13, {0, 1, 12}, [&](const arch::emu::Options& options) {
    const SparsePrefillParams p{.out = tensors[0].any<3>(),
                                .lse = tensors[1].typed<float, 2>(),
                                .q = tensors[2].any<3>(),
                                .k_cache = tensors[3].any<4>(),
                                .v_cache = tensors[4].any<4>(),
                                .block_table = tensors[5].typed<const int32_t, 2>(),
                                .logit_scale = tensors[6].typed<const float, 1>(),
                                .rope_table = tensors[7].typed<const float, 3>(),
                                .verticals = tensors[8].typed<const int32_t, 2>(),
                                .vertical_count = tensors[9].typed<const int32_t, 2>(),
                                .runs = tensors[10].typed<const int32_t, 4>(),
                                .run_count = tensors[11].typed<const int32_t, 2>(),
                                .scratch = tensors[12].any<4>(),
                                .q_begin = q_begin,
                                .segment_begin = segment_begin,
                                .segment_end = segment_end,
                                .dual_chunk = {chunk_size, local_size},
                                .tile_tokens = tile_tokens,
                                .exact = exact != 0};
    if (p.scratch) check_attention(p);  // the data lie on the host here: values are checked too
    check_sparse_prefill_gpu(p);
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
