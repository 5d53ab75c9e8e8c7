// CPU backend of widen_pages: a task is a page of one head.
#include "common/dispatch.h"
#include "common/math.h"
#include "common/rows.h"
#include "common/target.h"
#include "ops/widen_pages/widen_pages_check.h"

namespace qwen1m {
namespace {

template <typename T>
Q1M_INLINE void widen(const e4m3* in, int64_t n, float scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, static_cast<float>(in[i]) * scale);
}
template <typename T>
void widen_portable(const e4m3* in, int64_t n, float scale, T* out) {
  widen(in, n, scale, out);
}
template <typename T>
Q1M_TARGET_AVX512 void widen_avx512(const e4m3* in, int64_t n, float scale, T* out) {
  widen(in, n, scale, out);
}

}  // namespace

void widen_pages_cpu(const WidenPagesParams& p, const ParallelFor& parallel_for) {
  check_widen_pages_layout(p);
  check_widen_pages_values(p);
  const int64_t kv_heads = p.codes.size(1), elems = kPageSize * p.codes.size(3);
  const auto codes = p.codes.as<const e4m3>();
  dispatch_dtype(p.wide.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto wide = p.wide.as<T>();
    const auto run = choose_variant(widen_portable<T>, widen_avx512<T>);
    for_each_row(parallel_for, p.pages.size(0) * kv_heads, elems, [&](int64_t i) {
      const int64_t page = *p.pages.at(i / kv_heads), head = i % kv_heads;
      run(codes.at(page, head), elems, *p.scale.at(head), wide.at(page, head));
    });
  });
}

}  // namespace qwen1m
