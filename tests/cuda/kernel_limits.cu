// The dynamic shared memory of every kernel, checked at compile time: tests/cuda/test_kernels.py
// compiles this and looks for the kernels' names. A change here changes how many blocks share a
// multiprocessor.
#include "ops/prefill_attention/prefill_attention_sm80.cuh"
#include "ops/prefill_attention/prefill_attention_sm90.cuh"

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
