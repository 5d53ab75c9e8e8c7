// The dynamic shared memory of every kernel, checked at compile time: tests/cuda/test_kernels.py
// compiles this and looks for the kernels' names. A change here changes how many blocks share a
// multiprocessor.
#include "ops/decode_attention/decode_attention_sm80.cuh"
#include "ops/decode_attention/decode_attention_sm90.cuh"
#include "ops/embedding/embedding_kernel.cuh"
#include "ops/prefill_attention/prefill_attention_sm80.cuh"
#include "ops/prefill_attention/prefill_attention_sm90.cuh"
#include "ops/qkv_rope_append/qkv_rope_append_kernel.cuh"
#include "ops/rms_norm/rms_norm_kernel.cuh"
#include "ops/sample/sample_kernel.cuh"
#include "ops/sparse_estimate/sparse_estimate_sm80.cuh"
#include "ops/sparse_plan/sparse_plan_sm80.cuh"
#include "ops/sparse_prefill/sparse_prefill_gather.cuh"
#include "ops/sparse_prefill/sparse_prefill_sm80.cuh"
#include "ops/sparse_prefill/sparse_prefill_sm90.cuh"
#include "ops/swiglu/swiglu_kernel.cuh"
#include "ops/widen_pages/widen_pages_kernel.cuh"

using namespace qwen1m;

template <typename Kernel, uint32_t kBytes, int kBlocksPerSm, uint32_t kSmBytes>
constexpr bool fits() {
  // The runtime keeps 1 KB of shared memory per block.
  static_assert(sizeof(typename Kernel::Smem) <= kBytes);
  static_assert(kBlocksPerSm * (kBytes + 1024) <= kSmBytes, "blocks of a multiprocessor");
  return true;
}

constexpr uint32_t kSm90 = 228 * 1024, kSm80 = 164 * 1024;  // of a multiprocessor
static_assert(fits<PrefillAttentionSm90<128>, 164864, 1, kSm90>(), "prefill_attention_sm90_d128");
static_assert(fits<PrefillAttentionSm90<64>, 148480, 1, kSm90>(), "prefill_attention_sm90_d64");
static_assert(fits<PrefillAttentionSm80<128>, 66560, 2, kSm80>(), "prefill_attention_sm80_d128");
static_assert(fits<PrefillAttentionSm80<64>, 33792, 2, kSm80>(), "prefill_attention_sm80_d64");
static_assert(fits<EmbeddingKernel, 1, 16, kSm80>(), "embedding_kernel");
static_assert(fits<QkvRopeAppendKernel<bf16>, 1, 16, kSm80>(), "qkv_rope_append_kernel");
static_assert(fits<QkvRopeAppendKernel<e4m3>, 1, 16, kSm80>(), "qkv_rope_append_kernel_fp8");
static_assert(fits<RmsNormKernel, 128, 16, kSm80>(), "rms_norm_kernel");
static_assert(fits<SampleKernel<float, 8>, 4400, 4, kSm90>(), "sample_kernel_sm90_fp32");
static_assert(fits<SampleKernel<bf16, 8>, 4400, 4, kSm90>(), "sample_kernel_sm90_bf16");
static_assert(fits<SampleKernel<float, 1>, 304, 1, kSm80>(), "sample_kernel_sm80_fp32");
static_assert(fits<SampleKernel<bf16, 1>, 304, 1, kSm80>(), "sample_kernel_sm80_bf16");
static_assert(fits<SwigluKernel, 1, 8, kSm80>(), "swiglu_kernel");
static_assert(fits<WidenPagesKernel, 1, 16, kSm80>(), "widen_pages_kernel");
static_assert(fits<DecodeAttentionSm90<128, 1>, 103424, 2, kSm90>(),
              "decode_attention_sm90_d128_r16");
static_assert(fits<DecodeAttentionSm90<128, 2>, 107520, 2, kSm90>(),
              "decode_attention_sm90_d128_r32");
static_assert(fits<DecodeAttentionSm90<64, 1>, 101376, 2, kSm90>(),
              "decode_attention_sm90_d64_r16");
static_assert(fits<DecodeAttentionSm90<64, 2>, 103424, 2, kSm90>(),
              "decode_attention_sm90_d64_r32");
static_assert(fits<DecodeAttentionSm80<128, 1>, 70656, 2, kSm80>(),
              "decode_attention_sm80_d128_r16");
static_assert(fits<DecodeAttentionSm80<128, 2>, 74752, 2, kSm80>(),
              "decode_attention_sm80_d128_r32");
static_assert(fits<DecodeAttentionSm90<128, 1, e4m3>, 103424, 2, kSm90>(),
              "decode_attention_sm90_d128_fp8_r16");
static_assert(fits<DecodeAttentionSm90<64, 1, e4m3>, 101376, 2, kSm90>(),
              "decode_attention_sm90_d64_fp8_r16");
static_assert(fits<DecodeAttentionSm80<128, 1, e4m3>, 70656, 2, kSm80>(),
              "decode_attention_sm80_d128_fp8_r16");
static_assert(fits<DecodeAttentionSm80<64, 1, e4m3>, 68608, 2, kSm80>(),
              "decode_attention_sm80_d64_fp8_r16");
static_assert(fits<DecodeAttentionSm80<64, 1>, 68608, 2, kSm80>(), "decode_attention_sm80_d64_r16");
static_assert(fits<DecodeAttentionSm80<64, 2>, 70656, 2, kSm80>(), "decode_attention_sm80_d64_r32");
static_assert(fits<SparsePrefillSm90<128>, 232448, 1, kSm90>(), "sparse_prefill_sm90_d128");
static_assert(fits<SparsePrefillSm90<64>, 218112, 1, kSm90>(), "sparse_prefill_sm90_d64");
static_assert(fits<SparsePrefillSm90<128, 2>, 232448, 1, kSm90>(), "sparse_prefill_sm90_d128_pair");
static_assert(fits<SparsePrefillSm90<64, 2>, 218112, 1, kSm90>(), "sparse_prefill_sm90_d64_pair");
static_assert(fits<SparsePrefillSm80<128>, 66560, 2, kSm80>(), "sparse_prefill_sm80_d128");
static_assert(fits<SparsePrefillSm80<64>, 33792, 2, kSm80>(), "sparse_prefill_sm80_d64");
static_assert(fits<SparseGather, 1024, 8, kSm80>(), "sparse_prefill_gather");
static_assert(fits<EstimateStatisticsSm80<128>, 81920, 1, kSm80>(),
              "sparse_estimate_statistics_d128");
static_assert(fits<EstimateStatisticsSm80<64>, 40960, 2, kSm80>(),
              "sparse_estimate_statistics_d64");
static_assert(fits<EstimateSumsSm80<128>, 91136, 1, kSm80>(), "sparse_estimate_sums_d128");
static_assert(fits<EstimateSumsSm80<64>, 50176, 2, kSm80>(), "sparse_estimate_sums_d64");
static_assert(fits<EstimateCombine, 1024, 2, kSm80>(), "sparse_estimate_combine");
static_assert(fits<SparsePlanSm80, 33856, 4, kSm80>(), "sparse_plan_kernel");
