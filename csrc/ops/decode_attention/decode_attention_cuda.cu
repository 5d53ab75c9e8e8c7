// CUDA backend of decode_attention: chooses the kernel and launches it.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/decode_attention/decode_attention_launch.h"

namespace qwen1m {
namespace {

using Sm90D128Fp8 = DecodeAttentionSm90<128, 1, e4m3>;
using Sm90D64Fp8 = DecodeAttentionSm90<64, 1, e4m3>;
using Sm80D128Fp8 = DecodeAttentionSm80<128, 1, e4m3>;
using Sm80D64Fp8 = DecodeAttentionSm80<64, 1, e4m3>;
using Sm90D128R16 = DecodeAttentionSm90<128, 1>;
using Sm90D128R32 = DecodeAttentionSm90<128, 2>;
using Sm90D64R16 = DecodeAttentionSm90<64, 1>;
using Sm90D64R32 = DecodeAttentionSm90<64, 2>;
using Sm80D128R16 = DecodeAttentionSm80<128, 1>;
using Sm80D128R32 = DecodeAttentionSm80<128, 2>;
using Sm80D64R16 = DecodeAttentionSm80<64, 1>;
using Sm80D64R32 = DecodeAttentionSm80<64, 2>;
Q1M_KERNEL_SM90(decode_attention_sm90_d128_fp8_r16, Sm90D128Fp8, kDecodeBlocksPerSm)
Q1M_KERNEL_SM90(decode_attention_sm90_d64_fp8_r16, Sm90D64Fp8, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d128_fp8_r16, Sm80D128Fp8, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d64_fp8_r16, Sm80D64Fp8, kDecodeBlocksPerSm)
Q1M_KERNEL_SM90(decode_attention_sm90_d128_r16, Sm90D128R16, kDecodeBlocksPerSm)
Q1M_KERNEL_SM90(decode_attention_sm90_d128_r32, Sm90D128R32, kDecodeBlocksPerSm)
Q1M_KERNEL_SM90(decode_attention_sm90_d64_r16, Sm90D64R16, kDecodeBlocksPerSm)
Q1M_KERNEL_SM90(decode_attention_sm90_d64_r32, Sm90D64R32, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d128_r16, Sm80D128R16, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d128_r32, Sm80D128R32, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d64_r16, Sm80D64R16, kDecodeBlocksPerSm)
Q1M_KERNEL_SM80(decode_attention_sm80_d64_r32, Sm80D64R32, kDecodeBlocksPerSm)

template <typename Kernel, typename Params>
void launch(void (*kernel)(Params), const char* name, const Params& params, Stream stream) {
  arch::launch(kernel,
               {.name = name,
                .blocks = params.launch.num_blocks(),
                .threads = Kernel::kThreads,
                .shared_bytes = sizeof(typename Kernel::Smem),
                .dependent = arch::require_sm80(name) == 90,
                .stream = stream},
               params);
}

#define Q1M_LAUNCH(Kernel, name, params) launch<Kernel>(name, #name, params, stream)

}  // namespace

void decode_attention_cuda(const DecodeAttentionParams& p, Stream stream) {
  const DecodeLaunch plan = plan_decode_attention(p, arch::device_facts().num_sms);
  if (plan.num_blocks() == 0) return;
  const bool wide = p.q.size(3) == 128, many_rows = plan.rows == 32;
  const bool fp8 = p.k_cache.dtype == DType::kFloat8E4M3;
  if (arch::kernel_architecture("decode_attention") == 90) {
    const AnyView<4>&k = plan.args.k_cache, &v = plan.args.v_cache;
    const int64_t stored_dim = k.size(3);
    const uint32_t box = stored_dim == 128  ? kStepKeys<128>
                         : stored_dim == 64 ? kStepKeys<64>
                                            : kStepKeys<32>;
    const DecodeParamsSm90 params{plan, arch::make_tensor_map(page_map(k, box)),
                                  arch::make_tensor_map(page_map(v, box))};
    if (fp8 && wide) {
      Q1M_LAUNCH(Sm90D128Fp8, decode_attention_sm90_d128_fp8_r16, params);
    } else if (fp8) {
      Q1M_LAUNCH(Sm90D64Fp8, decode_attention_sm90_d64_fp8_r16, params);
    } else if (wide && many_rows) {
      Q1M_LAUNCH(Sm90D128R32, decode_attention_sm90_d128_r32, params);
    } else if (wide) {
      Q1M_LAUNCH(Sm90D128R16, decode_attention_sm90_d128_r16, params);
    } else if (many_rows) {
      Q1M_LAUNCH(Sm90D64R32, decode_attention_sm90_d64_r32, params);
    } else {
      Q1M_LAUNCH(Sm90D64R16, decode_attention_sm90_d64_r16, params);
    }
  } else if (fp8 && wide) {
    Q1M_LAUNCH(Sm80D128Fp8, decode_attention_sm80_d128_fp8_r16, {plan});
  } else if (fp8) {
    Q1M_LAUNCH(Sm80D64Fp8, decode_attention_sm80_d64_fp8_r16, {plan});
  } else if (wide && many_rows) {
    Q1M_LAUNCH(Sm80D128R32, decode_attention_sm80_d128_r32, {plan});
  } else if (wide) {
    Q1M_LAUNCH(Sm80D128R16, decode_attention_sm80_d128_r16, {plan});
  } else if (many_rows) {
    Q1M_LAUNCH(Sm80D64R32, decode_attention_sm80_d64_r32, {plan});
  } else {
    Q1M_LAUNCH(Sm80D64R16, decode_attention_sm80_d64_r16, {plan});
  }
}

}  // namespace qwen1m
