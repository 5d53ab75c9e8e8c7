// swiglu's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/swiglu/swiglu_kernel.cuh"

namespace qwen1m {

/// Arguments: out, gate_up.
/// See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_swiglu(const EmulatedTensor* tensors, const EmulatedCall* call) {
  return run_emulated(*call, tensors, 2, {0}, [&](const arch::emu::Options& options) {
    const SwigluParams p{.out = tensors[0].any<2>(), .gate_up = tensors[1].any<2>()};
    check_swiglu_gpu(p);
    return emulate_kernel<SwigluKernel>(SwigluKernel::params_of(p), options);
  });
}

}  // namespace qwen1m
