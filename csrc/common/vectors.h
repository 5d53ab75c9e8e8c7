#pragma once
/// Rows as vectors of 8 bf16 (16 bytes): what the elementwise GPU kernels are made of, and what
/// they demand of a tensor.

#include <string>

#include "arch/arch.h"
#include "common/check.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

inline constexpr int kVectorElems = 8;

/// The 8 values of a vector as fp32, and back with one rounding each.
Q1M_DEVICE void unpack(const arch::Vec16& vector, float (&values)[kVectorElems]) {
  Q1M_UNROLL
  for (int w = 0; w < 4; ++w) {
    values[2 * w] = arch::bf16_low(vector.word[w]);
    values[2 * w + 1] = arch::bf16_high(vector.word[w]);
  }
}
Q1M_DEVICE arch::Vec16 pack(const float (&values)[kVectorElems]) {
  arch::Vec16 vector;
  Q1M_UNROLL
  for (int w = 0; w < 4; ++w) {
    vector.word[w] = arch::pack_bf16(values[2 * w], values[2 * w + 1]);
  }
  return vector;
}

/// Vector number `index` behind an element.
template <typename T>
Q1M_DEVICE const arch::Vec16* vector_at(const T* row, int64_t index) {
  return reinterpret_cast<const arch::Vec16*>(row) + index;
}
template <typename T>
Q1M_DEVICE arch::Vec16* vector_at(T* row, int64_t index) {
  return reinterpret_cast<arch::Vec16*>(row) + index;
}

/// A GPU kernel's demands: every row starts at a multiple of 16 bytes. Strides of dimensions that
/// have one entry do not matter.
template <int Rank>
void require_aligned_rows(const ArgCheck& args, const char* name, const AnyView<Rank>& view) {
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  args.require(address % 16 == 0, name, "data aligned to 16 bytes on a GPU", address % 16);
  const int64_t elems = 16 / element_size(view.dtype);
  for (int dim = 0; dim < Rank - 1; ++dim) {
    if (view.size(dim) <= 1) continue;
    args.require(view.stride(dim) % elems == 0, name,
                 "stride of dimension " + std::to_string(dim) + " a multiple of " +
                     std::to_string(elems) + " on a GPU",
                 view.stride(dim));
  }
}

/// The same, and bf16.
template <int Rank>
void require_bf16_vectors(const ArgCheck& args, const char* name, const AnyView<Rank>& view) {
  if (view.dtype != DType::kBFloat16) {
    args.fail(name, "dtype bfloat16 (the GPU kernel has no other)", dtype_name(view.dtype));
  }
  require_aligned_rows(args, name, view);
}

}  // namespace qwen1m
