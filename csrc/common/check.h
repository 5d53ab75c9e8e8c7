#pragma once
/// Argument checks, one `ArgCheck` per call of an op. Every failure throws qwen1m::Error with the
/// op, the argument, what was expected and what was found:
///   qkv_rope_append: k_cache: expected shape [pages, kv_heads, 128, D=64], got [8, 2, 128, 32]

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// "[2, 3]"
std::string shape_text(std::span<const int64_t> sizes);
const char* dtype_name(DType);

/// Throws Error("<op>: <argument>: expected <expected>, got <got>").
[[noreturn]] void fail_argument(std::string_view op, std::string_view argument,
                                std::string_view expected, std::string_view got);

/// One entry of an expected shape.
struct Dim {
  std::string_view name;
  int64_t size = -1;

  Dim(int64_t number) : size(number) {}      // NOLINT: this very size
  Dim(const char* symbol) : name(symbol) {}  // NOLINT: the size this name met first in the call
  Dim(const char* expression, int64_t value) : name(expression), size(value) {}  // "2 n", 2 * n
};

class ArgCheck {
 public:
  explicit ArgCheck(std::string_view op) : op_(op) {}

  /// The sizes fit, names included.
  template <typename View>
  void shape(std::string_view argument, const View& view, std::initializer_list<Dim> dims) {
    check_shape(argument, view.sizes, dims);
  }

  /// The size a name stands for; it must have been met.
  int64_t size(std::string_view name) const;

  /// Dimensions first_dim, first_dim + 1, ... lie densely, the last with stride 1.
  template <typename View>
  void dense_from(int first_dim, std::string_view argument, const View& view) const {
    check_dense(first_dim, argument, view.sizes, view.strides);
  }

  /// For a tensor that is written: no two rows (of dimension 0) overlap, as they do in an expanded
  /// tensor. The rows are dense.
  template <typename View>
  void separate_rows(std::string_view argument, const View& view) const {
    check_separate_rows(argument, view.sizes, view.strides);
  }

  /// Same element type as another argument.
  template <int RankA, int RankB>
  void same_dtype(std::string_view argument, const AnyView<RankA>& view, std::string_view other,
                  const AnyView<RankB>& other_view) const {
    if (view.dtype == other_view.dtype) return;
    fail(argument,
         std::string("dtype ") + dtype_name(other_view.dtype) + " (as " + std::string(other) + ")",
         dtype_name(view.dtype));
  }

  /// Anything else: fails unless `ok`, `got` being the value at fault.
  template <typename Value>
  void require(bool ok, std::string_view argument, std::string_view expected, Value got) const {
    if (!ok) fail(argument, expected, std::to_string(got));
  }

  [[noreturn]] void fail(std::string_view argument, std::string_view expected,
                         std::string_view got) const {
    fail_argument(op_, argument, expected, got);
  }

 private:
  const int64_t* find(std::string_view name) const;
  void check_shape(std::string_view argument, std::span<const int64_t> sizes,
                   std::span<const Dim> dims);
  void check_dense(int first_dim, std::string_view argument, std::span<const int64_t> sizes,
                   std::span<const int64_t> strides) const;
  void check_separate_rows(std::string_view argument, std::span<const int64_t> sizes,
                           std::span<const int64_t> strides) const;

  std::string_view op_;
  std::vector<std::pair<std::string_view, int64_t>> bound_;
};

}  // namespace qwen1m
