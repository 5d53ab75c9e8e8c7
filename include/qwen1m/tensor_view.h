#pragma once
/// Non-owning views: pointer, sizes and strides. Sizes and strides are in elements and 64-bit,
/// because one million tokens times heads times head_dim overflows 32 bits. Everything is
/// constexpr, so that device code may call it (nvcc --expt-relaxed-constexpr).

#include <array>
#include <cstddef>
#include <cstdint>

#include "qwen1m/dtypes.h"

namespace qwen1m {

/// A view of `Rank` dimensions over elements of type T. `data` is null for an absent tensor.
template <typename T, int Rank>
struct TensorView {
  T* data = nullptr;
  std::array<int64_t, Rank> sizes{};
  std::array<int64_t, Rank> strides{};

  constexpr int64_t size(int dim) const { return sizes[static_cast<size_t>(dim)]; }
  constexpr int64_t stride(int dim) const { return strides[static_cast<size_t>(dim)]; }
  constexpr explicit operator bool() const { return data != nullptr; }

  /// Address of an element; trailing indices may be left out (they are 0).
  template <typename... Index>
  constexpr T* at(Index... index) const {
    static_assert(sizeof...(Index) <= Rank);
    int64_t offset = 0;
    size_t dim = 0;
    ((offset += static_cast<int64_t>(index) * strides[dim++]), ...);
    return data + offset;
  }
};

/// A view whose element type is known at run time only: `void` data and a dtype.
template <int Rank>
struct AnyView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::array<int64_t, Rank> sizes{};
  std::array<int64_t, Rank> strides{};

  constexpr int64_t size(int dim) const { return sizes[static_cast<size_t>(dim)]; }
  constexpr int64_t stride(int dim) const { return strides[static_cast<size_t>(dim)]; }
  constexpr explicit operator bool() const { return data != nullptr; }

  /// The same view with its element type spelled out. The caller has checked `dtype`.
  template <typename T>
  constexpr TensorView<T, Rank> as() const {
    return {static_cast<T*>(data), sizes, strides};
  }
};

}  // namespace qwen1m
