// decode_attention's GPU kernels under the emulator: for tests (tests/lib/emulator.py).
#include <string>

#include "common/emulated_call.h"
#include "ops/decode_attention/decode_attention_launch.h"

namespace qwen1m {
namespace {

/// Of the emulated machine; EMULATED_SMS of tests/lib/emulator.py.
constexpr int kEmulatedSms = 6;

template <typename Kernel>
arch::emu::Report emulate(const typename Kernel::Params& params,
                          const arch::emu::Options& options) {
  return arch::emu::launch(
      {.blocks = params.launch.num_blocks(),
       .threads = Kernel::kThreads,
       .shared_bytes = sizeof(typename Kernel::Smem)},
      [&] { Kernel::run(params); }, options);
}

template <int kHeadDim, int kRowTiles, typename Cache>
arch::emu::Report emulate(int64_t architecture, const DecodeLaunch& launch,
                          const arch::emu::Options& options) {
  if (architecture == 80) {
    return emulate<DecodeAttentionSm80<kHeadDim, kRowTiles, Cache>>({launch}, options);
  }
  constexpr uint32_t kBox = DecodeAttentionSm90<kHeadDim, kRowTiles, Cache>::kKeys;
  return emulate<DecodeAttentionSm90<kHeadDim, kRowTiles, Cache>>(
      {launch, arch::emu::make_tensor_map(page_map(launch.args.k_cache, kBox)),
       arch::emu::make_tensor_map(page_map(launch.args.v_cache, kBox))},
      options);
}

}  // namespace

/// Arguments: out, lse (data may be null), q, k_cache, v_cache, block_table, kv_len, logit_scale,
/// rope_table, scratch for kEmulatedSms multiprocessors, k_scale, v_scale. See emulated_call.h for
/// the rest and the result.
Q1M_EMULATED_CALL int qwen1m_emu_decode_attention(const EmulatedTensor* tensors, int64_t chunk_size,
                                                  int64_t local_size, const EmulatedCall* call) {
  return run_emulated(*call, tensors, 12, {0, 1, 9}, [&](const arch::emu::Options& options) {
    const DecodeAttentionParams p{.out = tensors[0].any<4>(),
                                  .lse = tensors[1].typed<float, 3>(),
                                  .q = tensors[2].any<4>(),
                                  .k_cache = tensors[3].any<4>(),
                                  .v_cache = tensors[4].any<4>(),
                                  .block_table = tensors[5].typed<const int32_t, 2>(),
                                  .kv_len = tensors[6].typed<const int64_t, 1>(),
                                  .logit_scale = tensors[7].typed<const float, 2>(),
                                  .rope_table = tensors[8].typed<const float, 3>(),
                                  .dual_chunk = {chunk_size, local_size},
                                  .scratch = tensors[9].typed<uint8_t, 1>(),
                                  .k_scale = tensors[10].typed<const float, 1>(),
                                  .v_scale = tensors[11].typed<const float, 1>()};
    check_attention(p);  // the data lie on the host here, so that values are checked too
    const DecodeLaunch launch = plan_decode_attention(p, kEmulatedSms);
    if (launch.num_blocks() == 0) {  // as the CUDA backend does
      arch::emu::Report nothing_to_do;
      nothing_to_do.completed = true;
      return nothing_to_do;
    }
    const bool many_rows = launch.rows == 32;
    const bool wide = p.q.size(3) == 128, fp8 = p.k_cache.dtype == DType::kFloat8E4M3;
    const auto kernel = fp8    ? (wide ? emulate<128, 1, e4m3> : emulate<64, 1, e4m3>)
                        : wide ? (many_rows ? emulate<128, 2, bf16> : emulate<128, 1, bf16>)
                               : (many_rows ? emulate<64, 2, bf16> : emulate<64, 1, bf16>);
    return kernel(call->architecture, launch, options);
  });
}

}  // namespace qwen1m
