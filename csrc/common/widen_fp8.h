#pragma once

#include <cstdint>

#include "qwen1m/dtypes.h"

namespace qwen1m {

/// out = in for n elements, exactly (e4m3 is a subset of bf16); `dtype` is that of out, fp32 or
/// bf16.
void widen_fp8(const e4m3* in, int64_t n, DType dtype, void* out);

}  // namespace qwen1m
