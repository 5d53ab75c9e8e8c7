// widen_pages' GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/widen_pages/widen_pages_kernel.cuh"

namespace qwen1m {

/// Arguments: wide, codes, scale, pages.
/// See emulated_call.h for the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_widen_pages(const EmulatedTensor* tensors,
                                             const EmulatedCall* call) {
  return run_emulated(*call, tensors, 4, {0}, [&](const arch::emu::Options& options) {
    const WidenPagesParams p{.wide = tensors[0].any<4>(),
                             .codes = tensors[1].any<4>(),
                             .scale = tensors[2].typed<const float, 1>(),
                             .pages = tensors[3].typed<const int64_t, 1>()};
    check_widen_pages_gpu(p);
    return emulate_kernel<WidenPagesKernel>(WidenPagesKernel::params_of(p), options);
  });
}

}  // namespace qwen1m
