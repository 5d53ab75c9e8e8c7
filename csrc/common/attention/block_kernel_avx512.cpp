// Block kernels in fp32 for AVX-512 (F, BW, VL, DQ); bf16 caches are widened page by page.
#include "common/attention/row_kernel.h"
#include "common/attention/vector_kernel.h"

namespace qwen1m {
namespace {

// 32 registers. 8 x 3: 24 accumulators, 3 vectors of lanes, 1 broadcast; 11 loads for 24 products,
// where Zen 4 does one 512-bit load and one product a cycle. 8 x 2 for the multiples of 32 rows of
// sparse tiles. 16 x 1: as many independent chains as a product's latency needs when one vector
// holds all rows.
template <typename T>
constexpr BlockKernel kKernels[] = {
    VectorKernel<T, MultiplyFloats<16>, 16, 3, 8>::describe(CpuIsa::kAvx512),
    VectorKernel<T, MultiplyFloats<16>, 16, 2, 8>::describe(CpuIsa::kAvx512),
    VectorKernel<T, MultiplyFloats<16>, 16, 1, 16>::describe(CpuIsa::kAvx512),
    VectorKernel<T, MultiplyFloats<8>, 8, 1, 16>::describe(CpuIsa::kAvx512),
};
template <typename T>
constexpr BlockKernel kDecodeKernels[] = {
    RowKernel<T, MultiplyFloats<16>, 4>::describe(CpuIsa::kAvx512),
    RowKernel<T, MultiplyFloats<16>, 2>::describe(CpuIsa::kAvx512),
    RowKernel<T, MultiplyFloats<16>, 1>::describe(CpuIsa::kAvx512),
};

}  // namespace

BlockKernels avx512_kernels(DType dtype) {
  if (dtype == DType::kFloat32) return {kKernels<float>, 4};
  return {kKernels<bf16>, 4};
}

BlockKernels avx512_decode_kernels(DType dtype) {
  if (dtype == DType::kFloat32) return {kDecodeKernels<float>, 3};
  return {kDecodeKernels<bf16>, 3};
}

}  // namespace qwen1m
