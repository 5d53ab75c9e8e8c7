#include "common/widen_fp8.h"

#include "common/dispatch.h"
#include "common/math.h"
#include "common/target.h"

namespace qwen1m {
namespace {

template <typename T>
Q1M_INLINE void widen(const e4m3* in, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, static_cast<float>(in[i]));
}
template <typename T>
void widen_portable(const e4m3* in, int64_t n, T* out) {
  widen(in, n, out);
}
template <typename T>
Q1M_TARGET_AVX512 void widen_avx512(const e4m3* in, int64_t n, T* out) {
  widen(in, n, out);
}

}  // namespace

void widen_fp8(const e4m3* in, int64_t n, DType dtype, void* out) {
  dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    choose_variant(widen_portable<T>, widen_avx512<T>)(in, n, static_cast<T*>(out));
  });
}

}  // namespace qwen1m
