// Block kernels for AVX512_BF16: vdpbf16ps multiplies pairs of bf16 and adds both products to fp32.
// It treats denormals as zero and flushes them (Intel SDM, VDPBF16PS), whatever MXCSR says.
#include "common/attention/row_kernel.h"
#include "common/attention/vector_kernel.h"

namespace qwen1m {
namespace {

/// acc + a.low * b.low + a.high * b.high; a word is a pair of bf16.
template <int N>
struct MultiplyPairs {
  using F = typename Simd<N>::F;
  static constexpr int kElemsPerWord = 2;
  static Q1M_SIMD F mac(F acc, F a, F b) {
    if constexpr (N == 16) {
      return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    } else {
      return (F)_mm256_dpbf16_ps((__m256)acc, (__m256bh)a, (__m256bh)b);
    }
  }
  /// 1 in both elements of every word.
  static Q1M_SIMD F ones() { return (F)_mm512_set1_epi32(0x3f803f80); }

  /// a holds [16 / kLanes keys][kLanes], b the keys behind them. The result, rounded to the nearest
  /// bf16 or even, holds each two neighbouring keys as words, the first in the low half.
  template <int kLanes>
  static Q1M_SIMD F round_to_pairs(F a, F b) {
    static_assert(N == 16);
    struct Order {
      alignas(64) uint16_t from[32];
    };
    static constexpr Order kOrder = [] {
      Order order{};
      for (int word = 0; word < 16; ++word) {
        const int first = word / kLanes * 2 * kLanes + word % kLanes;
        order.from[2 * word] = static_cast<uint16_t>(first);
        order.from[2 * word + 1] = static_cast<uint16_t>(first + kLanes);
      }
      return order;
    }();
    const auto rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (F)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder.from), rounded);
  }
};

// Tile shapes: as in block_kernel_avx512.cpp.
constexpr BlockKernel kKernels[] = {
    VectorKernel<bf16, MultiplyPairs<16>, 16, 3, 8>::describe(CpuIsa::kAvx512Bf16),
    VectorKernel<bf16, MultiplyPairs<16>, 16, 2, 8>::describe(CpuIsa::kAvx512Bf16),
    VectorKernel<bf16, MultiplyPairs<16>, 16, 1, 16>::describe(CpuIsa::kAvx512Bf16),
    VectorKernel<bf16, MultiplyPairs<8>, 8, 1, 16>::describe(CpuIsa::kAvx512Bf16),
};
constexpr BlockKernel kDecodeKernels[] = {
    RowKernel<bf16, MultiplyPairs<16>, 4>::describe(CpuIsa::kAvx512Bf16),
    RowKernel<bf16, MultiplyPairs<16>, 2>::describe(CpuIsa::kAvx512Bf16),
    RowKernel<bf16, MultiplyPairs<16>, 1>::describe(CpuIsa::kAvx512Bf16),
};

}  // namespace

BlockKernels avx512_bf16_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return {kKernels, 4};
  return {};
}

BlockKernels avx512_bf16_decode_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return {kDecodeKernels, 3};
  return {};
}

}  // namespace qwen1m
