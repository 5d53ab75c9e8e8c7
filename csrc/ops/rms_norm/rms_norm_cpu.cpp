// CPU backend of rms_norm. Memory bound: a row (7 KB in bf16 for the 7B model) is read once from
// memory, the second pass finds it in the L1 cache.
#include <cmath>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/rows.h"
#include "common/target.h"
#include "ops/rms_norm/rms_norm_check.h"
#include "qwen1m/rms_norm.h"

namespace qwen1m {
namespace {

/// Partial sums of squares. Fixed, so that the result is the same whatever the vector width: this
/// file is compiled without contraction to FMA (CMakeLists.txt) for the same reason.
constexpr int64_t kLanes = 32;

template <typename T>
Q1M_INLINE float add_residual(T* residual, const T* x, int64_t i) {
  store(residual + i, load(residual + i) + load(x + i));
  return load(residual + i);
}

/// `source` is the row that is normalised: residual after the addition, or x.
template <typename T, bool kHasResidual>
Q1M_INLINE void rms_norm_row(T* out, T* residual, const T* x, const T* weight, int64_t hidden,
                             float eps) {
  float lanes[kLanes] = {};
  const int64_t whole = hidden / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = kHasResidual ? add_residual(residual, x, i + lane) : load(x + i + lane);
      lanes[lane] += value * value;
    }
  }
  for (int64_t i = whole; i < hidden; ++i) {
    const float value = kHasResidual ? add_residual(residual, x, i) : load(x + i);
    lanes[i - whole] += value * value;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }

  const float scale = 1.0f / std::sqrt(lanes[0] / static_cast<float>(hidden) + eps);
  const T* source = kHasResidual ? residual : x;
#pragma omp simd
  for (int64_t i = 0; i < hidden; ++i) {
    store(out + i, load(source + i) * scale * load(weight + i));
  }
}

template <typename T, bool kHasResidual>
void row_portable(T* out, T* residual, const T* x, const T* weight, int64_t hidden, float eps) {
  rms_norm_row<T, kHasResidual>(out, residual, x, weight, hidden, eps);
}

template <typename T, bool kHasResidual>
Q1M_TARGET_AVX512 void row_avx512(T* out, T* residual, const T* x, const T* weight, int64_t hidden,
                                  float eps) {
  rms_norm_row<T, kHasResidual>(out, residual, x, weight, hidden, eps);
}

template <typename T, bool kHasResidual>
void run(const RmsNormParams& p, const ParallelFor& parallel_for) {
  const auto row = choose_variant(row_portable<T, kHasResidual>, row_avx512<T, kHasResidual>);
  const auto out = p.out.as<T>(), residual = p.residual.as<T>();
  const auto x = p.x.as<const T>();
  const auto weight = p.weight.as<const T>();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  for_each_row(parallel_for, tokens, hidden, [&](int64_t t) {
    row(out.at(t), kHasResidual ? residual.at(t) : nullptr, x.at(t), weight.data, hidden, p.eps);
  });
}

}  // namespace

void rms_norm_cpu(const RmsNormParams& p, const ParallelFor& parallel_for) {
  check_rms_norm(p);
  dispatch_dtype(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    p.residual ? run<T, true>(p, parallel_for) : run<T, false>(p, parallel_for);
  });
}

}  // namespace qwen1m
