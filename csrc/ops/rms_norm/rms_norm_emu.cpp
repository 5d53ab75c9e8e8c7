// rms_norm's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/rms_norm/rms_norm_kernel.cuh"

namespace qwen1m {

/// Arguments: out, residual (data may be null), x, weight.
/// See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_rms_norm(const EmulatedTensor* tensors, double eps,
                                          const EmulatedCall* call) {
  return run_emulated(*call, tensors, 4, {0, 1}, [&](const arch::emu::Options& options) {
    const RmsNormParams p{.out = tensors[0].any<2>(),
                          .residual = tensors[1].any<2>(),
                          .x = tensors[2].any<2>(),
                          .weight = tensors[3].any<1>(),
                          .eps = static_cast<float>(eps)};
    check_rms_norm_gpu(p);
    return emulate_kernel<RmsNormKernel>(RmsNormKernel::params_of(p), options);
  });
}

}  // namespace qwen1m
