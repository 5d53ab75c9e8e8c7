// CPU backend of swiglu. Memory bound.
#include "common/dispatch.h"
#include "common/math.h"
#include "common/rows.h"
#include "common/target.h"
#include "ops/swiglu/swiglu_check.h"
#include "qwen1m/swiglu.h"

namespace qwen1m {
namespace {

template <typename T>
Q1M_INLINE void swiglu_row(T* out, const T* gate, const T* up, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate + i);
    store(out + i, g * sigmoid(g) * load(up + i));
  }
}

template <typename T>
void row_portable(T* out, const T* gate, const T* up, int64_t n) {
  swiglu_row(out, gate, up, n);
}

template <typename T>
Q1M_TARGET_AVX512 void row_avx512(T* out, const T* gate, const T* up, int64_t n) {
  swiglu_row(out, gate, up, n);
}

template <typename T>
void run(const SwigluParams& p, const ParallelFor& parallel_for) {
  const auto row = choose_variant(row_portable<T>, row_avx512<T>);
  const auto out = p.out.as<T>();
  const auto gate_up = p.gate_up.as<const T>();
  const int64_t tokens = out.size(0), n = out.size(1);
  for_each_row(parallel_for, tokens, 2 * n,
               [&](int64_t t) { row(out.at(t), gate_up.at(t), gate_up.at(t) + n, n); });
}

}  // namespace

void swiglu_cpu(const SwigluParams& p, const ParallelFor& parallel_for) {
  check_swiglu(p);
  dispatch_dtype(p.out.dtype, [&](auto zero) { run<decltype(zero)>(p, parallel_for); });
}

}  // namespace qwen1m
