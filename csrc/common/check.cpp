#include "common/check.h"

#include "qwen1m/error.h"

namespace qwen1m {
namespace {

bool is_empty(std::span<const int64_t> sizes) {
  for (const int64_t size : sizes) {
    if (size == 0) return true;
  }
  return false;
}

}  // namespace

std::string shape_text(std::span<const int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32    ? "float32"
         : dtype == DType::kBFloat16 ? "bfloat16"
                                     : "float8_e4m3fn";
}

void fail_argument(std::string_view op, std::string_view argument, std::string_view expected,
                   std::string_view got) {
  std::string text(op);
  ((text += ": ") += argument) += ": expected ";
  ((text += expected) += ", got ") += got;
  throw Error(text);
}

const int64_t* ArgCheck::find(std::string_view name) const {
  for (const auto& [known, size] : bound_) {
    if (known == name) return &size;
  }
  return nullptr;
}

int64_t ArgCheck::size(std::string_view name) const {
  const int64_t* size = find(name);
  if (size == nullptr) fail(name, "a size met before", "nothing");
  return *size;
}

void ArgCheck::check_shape(std::string_view argument, std::span<const int64_t> sizes,
                           std::span<const Dim> dims) {
  const size_t known = bound_.size();
  bool fits = sizes.size() == dims.size();
  for (size_t i = 0; fits && i < dims.size(); ++i) {
    int64_t wanted = dims[i].size;
    if (wanted < 0) {
      const int64_t* bound = find(dims[i].name);
      wanted = bound != nullptr ? *bound : sizes[i];
      if (bound == nullptr) bound_.emplace_back(dims[i].name, sizes[i]);
    }
    fits = sizes[i] == wanted;
  }
  if (fits) return;

  bound_.resize(known);  // the text gives the sizes known before this argument
  std::string expected = "shape [";
  for (const Dim& dim : dims) {
    if (expected.back() != '[') expected += ", ";
    expected += dim.name;
    const int64_t* bound = dim.size >= 0 ? &dim.size : find(dim.name);
    if (bound == nullptr) continue;
    if (!dim.name.empty()) expected += "=";
    expected += std::to_string(*bound);
  }
  fail(argument, expected + "]", shape_text(sizes));
}

void ArgCheck::check_dense(int first_dim, std::string_view argument, std::span<const int64_t> sizes,
                           std::span<const int64_t> strides) const {
  if (is_empty(sizes)) return;
  int64_t dense_stride = 1;
  for (size_t i = sizes.size(); i-- > static_cast<size_t>(first_dim);) {
    if (sizes[i] != 1 && strides[i] != dense_stride) {
      const size_t dims = sizes.size() - static_cast<size_t>(first_dim);
      fail(argument,
           first_dim == 0 ? std::string("a contiguous tensor")
           : dims == 1    ? std::string("a contiguous last dimension")
                          : "the last " + std::to_string(dims) + " dimensions contiguous",
           "shape " + shape_text(sizes) + " with strides " + shape_text(strides));
    }
    dense_stride *= sizes[i];
  }
}

void ArgCheck::check_separate_rows(std::string_view argument, std::span<const int64_t> sizes,
                                   std::span<const int64_t> strides) const {
  if (is_empty(sizes) || sizes[0] == 1) return;
  int64_t row_elems = 1;
  for (const int64_t size : sizes.subspan(1)) row_elems *= size;
  if (strides[0] >= row_elems) return;
  fail(argument, "rows that do not overlap, because they are written",
       "shape " + shape_text(sizes) + " with strides " + shape_text(strides));
}

}  // namespace qwen1m
