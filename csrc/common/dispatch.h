#pragma once

#include "common/cpu_features.h"
#include "qwen1m/dtypes.h"

namespace qwen1m {

/// Calls f(T{}) with T = float or bf16.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else {
    f(bf16{});
  }
}

/// The variant of a two-way compiled function (common/target.h) that this process uses.
template <typename Function>
Function* choose_variant(Function* portable, Function* avx512) {
  return cpu_isa() >= CpuIsa::kAvx512 ? avx512 : portable;
}

}  // namespace qwen1m
