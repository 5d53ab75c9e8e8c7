// sample's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/sample/sample_kernel.cuh"

namespace qwen1m {
namespace {

/// A cluster of 2 blocks stands for that of 8, except for the vocabulary of the models: every
/// thread has a clock of each other one, so that 4,096 of them take 16 times as long.
template <typename Logit>
arch::emu::Report emulate(const SampleParams& p, int64_t architecture,
                          const arch::emu::Options& options) {
  if (architecture != 90) return emulate_kernel<SampleKernel<Logit, 1>>({p}, options);
  return p.logits.size(1) > 100'000 ? emulate_kernel<SampleKernel<Logit, 8>>({p}, options)
                                    : emulate_kernel<SampleKernel<Logit, 2>>({p}, options);
}

}  // namespace

/// Arguments: token_ids, logprobs, history (data of these two may be null), logits, temperature,
/// top_k, top_p, min_p, penalties (null with history), seed, position. See emulated_call.h for the
/// rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_sample(const EmulatedTensor* tensors, const EmulatedCall* call) {
  return run_emulated(*call, tensors, 11, {0, 1, 2}, [&](const arch::emu::Options& options) {
    const SampleParams p{.token_ids = tensors[0].typed<int64_t, 1>(),
                         .logprobs = tensors[1].typed<float, 1>(),
                         .history = tensors[2].typed<int32_t, 2>(),
                         .logits = tensors[3].any<2>(),
                         .temperature = tensors[4].typed<const float, 1>(),
                         .top_k = tensors[5].typed<const int64_t, 1>(),
                         .top_p = tensors[6].typed<const float, 1>(),
                         .min_p = tensors[7].typed<const float, 1>(),
                         .penalties = tensors[8].typed<const float, 2>(),
                         .seed = tensors[9].typed<const int64_t, 1>(),
                         .position = tensors[10].typed<const int64_t, 1>()};
    check_sample_gpu(p);
    return (p.logits.dtype == DType::kFloat32 ? emulate<float>
                                              : emulate<bf16>)(p, call->architecture, options);
  });
}

}  // namespace qwen1m
