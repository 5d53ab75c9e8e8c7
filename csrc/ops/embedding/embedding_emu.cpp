// embedding's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/embedding/embedding_kernel.cuh"

namespace qwen1m {

/// Arguments: out, weight, token_ids.
/// See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_embedding(const EmulatedTensor* tensors,
                                           const EmulatedCall* call) {
  return run_emulated(*call, tensors, 3, {0}, [&](const arch::emu::Options& options) {
    const EmbeddingParams p{.out = tensors[0].any<2>(),
                            .weight = tensors[1].any<2>(),
                            .token_ids = tensors[2].typed<const int64_t, 1>()};
    check_embedding_gpu(p);
    return emulate_kernel<EmbeddingKernel>(EmbeddingKernel::params_of(p), options);
  });
}

}  // namespace qwen1m
