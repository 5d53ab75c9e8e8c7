// sparse_estimate's GPU kernels under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/sparse_estimate/sparse_estimate_launch.h"

namespace qwen1m {
namespace {

template <int kHeadDim>
arch::emu::Report emulate(const SparseEstimateParams& p, const arch::emu::Options& options) {
  arch::emu::Report report;
  report.completed = true;
  for_each_launch<kHeadDim>(
      p, [&]<typename Kernel>(Kernel, int64_t blocks, int threads, const SparseEstimateArgs& args) {
        if (!report.ok()) return;
        report = arch::emu::launch(
            {.blocks = blocks, .threads = threads, .shared_bytes = sizeof(typename Kernel::Smem)},
            [&] { Kernel::run({args}); }, options);
      });
  return report;
}

}  // namespace

/// Arguments: vertical, slash, q, k_cache, block_table, logit_scale, rope_table; segment_end,
/// chunk_size, local_size, critical. See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_sparse_estimate(const EmulatedTensor* tensors, int64_t segment_end,
                                                 int64_t chunk_size, int64_t local_size,
                                                 int64_t critical, const EmulatedCall* call) {
  return run_emulated(*call, tensors, 7, {0, 1}, [&](const arch::emu::Options& options) {
    const SparseEstimateParams p{.vertical = tensors[0].typed<float, 2>(),
                                 .slash = tensors[1].typed<float, 2>(),
                                 .q = tensors[2].any<3>(),
                                 .k_cache = tensors[3].any<4>(),
                                 .block_table = tensors[4].typed<const int32_t, 2>(),
                                 .logit_scale = tensors[5].typed<const float, 1>(),
                                 .rope_table = tensors[6].typed<const float, 3>(),
                                 .segment_end = segment_end,
                                 .dual_chunk = {chunk_size, local_size},
                                 .critical = critical != 0};
    check_attention(p);  // the data lie on the host here: values are checked too
    check_sparse_estimate_gpu(p);
    return p.q.size(2) == 128 ? emulate<128>(p, options) : emulate<64>(p, options);
  });
}

}  // namespace qwen1m
