#pragma once
/// Torch tensors to views. What a view cannot say is checked here (device, dtype, number of
/// dimensions); sizes, strides and values are checked by the op itself (common/check.h), for every
/// caller and with the same kind of text.

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "common/check.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m::binding {

using torch::headeronly::ScalarType;

/// "float32", "int64": the names of Python, not of C++.
std::string scalar_type_name(ScalarType type);

/// Reads the arguments of one call of `op`. `dims` is the documented shape, "[tokens, hidden]": it
/// gives the number of dimensions to the error text.
class TensorMatch {
 public:
  /// All tensors are on the CPU, or on the CUDA device of that number.
  explicit TensorMatch(const char* op, int cuda_device = kCpu)
      : op_(op), cuda_device_(cuda_device) {}

  /// float32 or bfloat16.
  template <int Rank>
  AnyView<Rank> floats(const torch::stable::Tensor& tensor, const char* name,
                       const char* dims) const {
    check(tensor, name, dims, Rank);
    AnyView<Rank> view;
    const ScalarType type = tensor.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::BFloat16) {
      fail_argument(op_, name, "dtype float32 or bfloat16", scalar_type_name(type));
    }
    view.dtype = type == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
    fill(view, tensor);
    return view;
  }
  /// The same or float8_e4m3fn.
  template <int Rank>
  AnyView<Rank> cache(const torch::stable::Tensor& tensor, const char* name,
                      const char* dims) const {
    if (tensor.scalar_type() != ScalarType::Float8_e4m3fn) return floats<Rank>(tensor, name, dims);
    check(tensor, name, dims, Rank);
    AnyView<Rank> view;
    view.dtype = DType::kFloat8E4M3;
    fill(view, tensor);
    return view;
  }
  template <int Rank>
  AnyView<Rank> floats(const std::optional<torch::stable::Tensor>& tensor, const char* name,
                       const char* dims) const {
    return tensor ? floats<Rank>(*tensor, name, dims) : AnyView<Rank>{};
  }

  /// Exactly T: an int32 tensor is not an int64 one.
  template <typename T, int Rank>
  TensorView<T, Rank> typed(const torch::stable::Tensor& tensor, const char* name,
                            const char* dims) const {
    check(tensor, name, dims, Rank);
    constexpr ScalarType kExpected = scalar_type_of<std::remove_const_t<T>>();
    if (tensor.scalar_type() != kExpected) {
      fail_argument(op_, name, "dtype " + scalar_type_name(kExpected),
                    scalar_type_name(tensor.scalar_type()));
    }
    TensorView<T, Rank> view;
    fill(view, tensor);
    return view;
  }
  template <typename T, int Rank>
  TensorView<T, Rank> typed(const std::optional<torch::stable::Tensor>& tensor, const char* name,
                            const char* dims) const {
    return tensor ? typed<T, Rank>(*tensor, name, dims) : TensorView<T, Rank>{};
  }

 private:
  static constexpr int kCpu = -1;

  template <typename T>
  static constexpr ScalarType scalar_type_of() {
    if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
    if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
    if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
    if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  }

  template <typename View>
  static void fill(View& view, const torch::stable::Tensor& tensor) {
    view.data = static_cast<decltype(view.data)>(tensor.data_ptr());
    std::ranges::copy(tensor.sizes(), view.sizes.begin());
    std::ranges::copy(tensor.strides(), view.strides.begin());
  }

  /// On the device, with `rank` dimensions.
  void check(const torch::stable::Tensor& tensor, const char* name, const char* dims,
             int rank) const;

  const char* op_;
  int cuda_device_;
};

}  // namespace qwen1m::binding
