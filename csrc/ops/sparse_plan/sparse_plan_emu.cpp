// sparse_plan's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/sparse_plan/sparse_plan_check.h"
#include "ops/sparse_plan/sparse_plan_sm80.cuh"

namespace qwen1m {

/// Arguments: those of the op, tensors first. See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_sparse_plan(const EmulatedTensor* tensors, int64_t segment_begin,
                                             int64_t chunk_size, int64_t local_size,
                                             int64_t tile_tokens, int64_t group, int64_t exact,
                                             int64_t fallback, const EmulatedCall* call) {
  return run_emulated(*call, tensors, 8, {0, 1, 2, 3}, [&](const arch::emu::Options& options) {
    const SparsePlanParams p{.verticals = tensors[0].typed<int32_t, 2>(),
                             .vertical_count = tensors[1].typed<int32_t, 2>(),
                             .runs = tensors[2].typed<int32_t, 4>(),
                             .run_count = tensors[3].typed<int32_t, 2>(),
                             .vertical_score = tensors[4].typed<const float, 2>(),
                             .slash_score = tensors[5].typed<const float, 2>(),
                             .v_size = tensors[6].typed<const int64_t, 1>(),
                             .s_size = tensors[7].typed<const int64_t, 1>(),
                             .segment_begin = segment_begin,
                             .dual_chunk = {chunk_size, local_size},
                             .tile_tokens = tile_tokens,
                             .group = group,
                             .exact = exact != 0,
                             .fallback = fallback != 0};
    check_sparse_plan(p);
    return arch::emu::launch(
        {.blocks = SparsePlanSm80::num_blocks(p),
         .threads = SparsePlanSm80::kThreads,
         .shared_bytes = sizeof(SparsePlanSm80::Smem)},
        [&] { SparsePlanSm80::run({p}); }, options);
  });
}

}  // namespace qwen1m
