// CPU backend of qkv_rope_append. Memory bound: every value is read once and written once.
#include "common/dispatch.h"
#include "common/math.h"
#include "common/rows.h"
#include "common/target.h"
#include "ops/qkv_rope_append/qkv_rope_append_check.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/qkv_rope_append.h"

namespace qwen1m {
namespace {

template <bool kHasBias, typename T>
Q1M_INLINE float biased(const T* x, const T* bias) {
  return kHasBias ? load(x) + load(bias) : load(x);
}

/// Into the cache: as it is, or divided by the scale and rounded to fp8.
template <typename T>
Q1M_INLINE void store_scaled(T* out, float value, float /*scale*/) {
  store(out, value);
}
Q1M_INLINE void store_scaled(e4m3* out, float value, float scale) {
  out->bits = e4m3(value / scale).bits;
}

/// out = x + bias
template <bool kHasBias, typename Out, typename T>
Q1M_INLINE void copy_biased(Out* out, const T* x, const T* bias, int64_t n, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store_scaled(out + i, biased<kHasBias>(x + i, bias + i), scale);
  }
}

/// out = R (x + bias) for one head; cos_sin is the table's row, [D/2, 2].
template <bool kHasBias, typename Out, typename T>
Q1M_INLINE void rotate_biased(Out* out, const T* x, const T* bias, const float* cos_sin,
                              int64_t half, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
    const float a = biased<kHasBias>(x + i, bias + i);
    const float b = biased<kHasBias>(x + half + i, bias + half + i);
    store_scaled(out + i, a * c - b * s, scale);
    store_scaled(out + half + i, b * c + a * s, scale);
  }
}

/// One token. Pointers of the cache are those of its slot in KV head 0; kv_stride elements lead to
/// the next head.
template <typename T, typename Cache>
struct TokenRow {
  T* q;
  Cache* k;  // null: append nothing
  Cache* v;
  const T* qkv;
  const T* bias;         // without one, any address as large: it is not read
  const float* cos_sin;  // null with k
  int64_t q_heads, kv_heads, head_dim, kv_stride;
  TensorView<const float, 1> k_scale, v_scale;
};

template <typename T, typename Cache, bool kHasBias>
Q1M_INLINE void append_token(const TokenRow<T, Cache>& row) {
  const int64_t d = row.head_dim, k_begin = row.q_heads * d, v_begin = k_begin + row.kv_heads * d;
  copy_biased<kHasBias>(row.q, row.qkv, row.bias, k_begin, 1.0f);
  if (row.k == nullptr) return;
  for (int64_t h = 0; h < row.kv_heads; ++h) {
    const int64_t k = k_begin + h * d, v = v_begin + h * d, to = h * row.kv_stride;
    rotate_biased<kHasBias>(row.k + to, row.qkv + k, row.bias + k, row.cos_sin, d / 2,
                            cache_scale(row.k_scale, h));
    copy_biased<kHasBias>(row.v + to, row.qkv + v, row.bias + v, d, cache_scale(row.v_scale, h));
  }
}

template <typename T, typename Cache, bool kHasBias>
void token_portable(const TokenRow<T, Cache>& row) {
  append_token<T, Cache, kHasBias>(row);
}

template <typename T, typename Cache, bool kHasBias>
Q1M_TARGET_AVX512 void token_avx512(const TokenRow<T, Cache>& row) {
  append_token<T, Cache, kHasBias>(row);
}

template <typename T, typename Cache, bool kHasBias>
void run(const QkvRopeAppendParams& p, const ParallelFor& parallel_for) {
  const auto append =
      choose_variant(token_portable<T, Cache, kHasBias>, token_avx512<T, Cache, kHasBias>);
  const auto q = p.q.as<T>();
  const auto k_cache = p.k_cache.as<Cache>(), v_cache = p.v_cache.as<Cache>();
  const auto qkv = p.qkv.as<const T>();
  const T* bias = p.bias.as<const T>().data;
  const DualChunk chunks{.chunk_size = p.chunk_len};
  const int64_t tokens = q.size(0), kv_heads = k_cache.size(1), head_dim = k_cache.size(3);
  for_each_row(parallel_for, tokens, qkv.size(1), [&](int64_t t) {
    TokenRow<T, Cache> row{.q = q.at(t),
                           .k = nullptr,
                           .v = nullptr,
                           .qkv = qkv.at(t),
                           .bias = kHasBias ? bias : qkv.at(t),
                           .cos_sin = nullptr,
                           .q_heads = q.size(1),
                           .kv_heads = kv_heads,
                           .head_dim = head_dim,
                           .kv_stride = kPageSize * head_dim,
                           .k_scale = p.k_scale,
                           .v_scale = p.v_scale};
    if (const int64_t slot = *p.slot_mapping.at(t); slot >= 0) {
      const int64_t page = slot / kPageSize, offset = slot % kPageSize;
      row.k = k_cache.data + (page * kv_heads * kPageSize + offset) * head_dim;
      row.v = v_cache.data + (page * kv_heads * kPageSize + offset) * head_dim;
      row.cos_sin = p.rope_table.at(chunks.key_position(*p.positions.at(t)));
    }
    append(row);
  });
}

}  // namespace

void qkv_rope_append_cpu(const QkvRopeAppendParams& p, const ParallelFor& parallel_for) {
  check_qkv_rope_append_layout(p);
  check_qkv_rope_append_values(p);
  dispatch_dtype(p.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.k_scale) {
      p.bias ? run<T, e4m3, true>(p, parallel_for) : run<T, e4m3, false>(p, parallel_for);
    } else {
      p.bias ? run<T, T, true>(p, parallel_for) : run<T, T, false>(p, parallel_for);
    }
  });
}

}  // namespace qwen1m
