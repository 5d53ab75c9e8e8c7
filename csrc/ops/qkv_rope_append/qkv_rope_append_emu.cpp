// qkv_rope_append's GPU kernel under the emulator: for tests (tests/lib/emulator.py).
#include "common/emulated_call.h"
#include "ops/qkv_rope_append/qkv_rope_append_kernel.cuh"

namespace qwen1m {

/// Arguments: q, k_cache, v_cache, qkv, bias (data may be null), positions, slot_mapping,
/// rope_table, k_scale, v_scale (null without fp8). See emulated_call.h for the rest and the
/// result.
Q1M_EMULATED_CALL int qwen1m_emu_qkv_rope_append(const EmulatedTensor* tensors, int64_t chunk_len,
                                                 const EmulatedCall* call) {
  return run_emulated(*call, tensors, 10, {0, 1, 2}, [&](const arch::emu::Options& options) {
    const QkvRopeAppendParams p{.q = tensors[0].any<3>(),
                                .k_cache = tensors[1].any<4>(),
                                .v_cache = tensors[2].any<4>(),
                                .qkv = tensors[3].any<2>(),
                                .bias = tensors[4].any<1>(),
                                .positions = tensors[5].typed<const int64_t, 1>(),
                                .slot_mapping = tensors[6].typed<const int64_t, 1>(),
                                .rope_table = tensors[7].typed<const float, 3>(),
                                .chunk_len = chunk_len,
                                .k_scale = tensors[8].typed<const float, 1>(),
                                .v_scale = tensors[9].typed<const float, 1>()};
    check_qkv_rope_append_gpu(p);
    const auto emulate = [&](auto cache) {
      using Kernel = QkvRopeAppendKernel<decltype(cache)>;
      return emulate_kernel<Kernel>(Kernel::params_of(p), options);
    };
    return p.k_scale ? emulate(e4m3{}) : emulate(bf16{});
  });
}

}  // namespace qwen1m
