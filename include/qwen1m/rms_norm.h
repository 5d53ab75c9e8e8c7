#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Root-mean-square normalisation, with the residual addition in front of it when there is one:
///   residual <- residual + x        (rounded to its dtype; what follows reads the rounded value)
///   out      <- residual / sqrt(mean(residual^2) + eps) * weight
/// Without a residual, x takes its place. Sums and products in fp32, one rounding at the end.
/// out may be x itself. Source: arXiv:1910.07467.
struct RmsNormParams {
  AnyView<2> out;       // [tokens, hidden] fp32 or bf16, last dim contiguous
  AnyView<2> residual;  // [tokens, hidden] as out, updated in place; data null: no residual
  AnyView<2> x;         // [tokens, hidden] as out
  AnyView<1> weight;    // [hidden] as out, contiguous
  float eps = 1e-6f;    // > 0, added to the mean of squares
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit.
void rms_norm_cpu(const RmsNormParams&, const ParallelFor&);

/// sm_80 and later: bf16, hidden a multiple of 8 up to 32,768, rows aligned to 16 bytes. All data
/// lie on the current device. Asynchronous. Throws as above, and on a launch that fails.
void rms_norm_cuda(const RmsNormParams&, Stream);

}  // namespace qwen1m
