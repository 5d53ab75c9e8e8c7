#pragma once
/// Block kernels (block_kernel.h) for the few rows of decode, AVX-512. With 4 to 8 rows the kernel
/// of vector_kernel.h would need more instructions per key than the time its bytes take to arrive,
/// so here a vector holds 4 rows x 4 words: one 128-bit broadcast of a key feeds 16 lanes, and the
/// four partial products of a row are added at the end. The output runs along D, without packing
/// the values: pairs of value rows are interleaved in registers.
///
/// The sums run in another order than in vector_kernel.h: decode has its own bits.

#include <array>
#include <utility>

#include "common/attention/block_kernel.h"
#include "common/attention/page_softmax.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// T: element of the cache. 4 * J lanes, J = 1 or 2.
template <typename T, typename Mac, int J>
struct RowKernel {
  using S = Simd<16>;
  using F = S::F;
  using U = S::U;
  static constexpr int kLanes = 4 * J;
  static constexpr int kKeys = 8;  // keys per register tile
  static constexpr int kElemsPerWord = Mac::kElemsPerWord;
  static constexpr bool kConvertsKeys = sizeof(T) == 2 && kElemsPerWord == 1;

  /// q becomes [D/4 or D/8][J][4 rows][4 words].
  static void pack_queries(const float* rows, int count, int64_t head_dim, float* q) {
    memset(q, 0, static_cast<size_t>(q_floats(head_dim)) * 4);
    for (int lane = 0; lane < count; ++lane) {
      const float* row = rows + lane * head_dim;
      for (int64_t w = 0; w < head_dim / kElemsPerWord; ++w) {
        float* to = q + (w / 4 * J + lane / 4) * 16 + lane % 4 * 4 + w % 4;
        if constexpr (kElemsPerWord == 2) {
          const uint16_t pair[2] = {bf16(row[2 * w]).bits, bf16(row[2 * w + 1]).bits};
          memcpy(to, pair, 4);
        } else {
          *to = row[w];
        }
      }
    }
  }

  static PageTile pack_page(const void* k, const void* v, int64_t head_dim, int lo, int hi,
                            float* k_pack, float* /*v_pack*/) {
    PageTile page{.k = k, .v = v, .k_row_words = head_dim / kElemsPerWord, .lo = lo, .hi = hi};
    if constexpr (kConvertsKeys) {
      const int first = lo / kKeys * kKeys, last = (hi + kKeys - 1) / kKeys * kKeys;
      for (int64_t i = first * head_dim; i < last * head_dim; i += 16) {
        S::store(k_pack + i, S::load_bf16(static_cast<const T*>(k) + i));
      }
      page.k = k_pack;
    }
    return page;
  }

  static void attend(const LaneBlock& block, const PageTile& page, int64_t head_dim,
                     float log2_scale, float* scores) {
    const LaneBlock::Keys keys = block.keys(page, kKeys);
    if (keys.hi <= page.lo) return;
    const int first = keys.first, last = keys.last;
    // The values of this page now; the keys of the next one while these values are used.
    Prefetch values(static_cast<const char*>(page.v), page.page_bytes);
    for (int key = first; key < last; key += kKeys) {
      score_keys(static_cast<const char*>(page.k) + key * page.k_row_words * 4, page.k_row_words,
                 block.q, scores + key * kLanes, values);
    }

    alignas(64) float rescale[kLanes];
    if (keys.some_masked) mask_scores<kLanes>(block, page, keys, 0, scores);
    softmax_lanes<kLanes, kElemsPerWord>(block, first, last, 0, log2_scale, scores, rescale);

    kAccumulate[block.rows - 1](block, page, keys.hi, head_dim, scores, rescale);
  }

  /// scores[key][lane] of 8 keys.
  static Q1M_SIMD void score_keys(const char* keys, int64_t row_words, const float* q,
                                  float* scores, Prefetch& prefetch) {
    F c[kKeys][J] = {};
    for (int64_t w = 0; w < row_words; w += 4, q += 16 * J) {
      prefetch.next_lines();
      F lanes[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) lanes[j] = S::load(q + 16 * j);
#pragma GCC unroll 8
      for (int r = 0; r < kKeys; ++r) {
        const F words = (F)_mm512_broadcast_f32x4(
            _mm_loadu_ps(reinterpret_cast<const float*>(keys + (r * row_words + w) * 4)));
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) c[r][j] = Mac::mac(c[r][j], words, lanes[j]);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kKeys; r += 4) {
      F sums[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j)
        sums[j] = add_words(c[r][j], c[r + 1][j], c[r + 2][j], c[r + 3][j]);
      // From [4 rows][4 keys] (per j) to [4 keys][4 J rows].
      float* to = scores + r * kLanes;
      if constexpr (J == 1) {
        S::store(to, __builtin_shufflevector(sums[0], sums[0], 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10,
                                             14, 3, 7, 11, 15));
      } else {
        S::store(to, __builtin_shufflevector(sums[0], sums[1], 0, 4, 8, 12, 16, 20, 24, 28,  //
                                             1, 5, 9, 13, 17, 21, 25, 29));
        S::store(to + 16, __builtin_shufflevector(sums[0], sums[1], 2, 6, 10, 14, 18, 22, 26, 30, 3,
                                                  7, 11, 15, 19, 23, 27, 31));
      }
    }
  }

  /// Four vectors [4 rows][4 words], one per key, to their sums over the words: [4 rows][4 keys].
  static Q1M_SIMD F add_words(F key0, F key1, F key2, F key3) {
    const auto add_halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d a = _mm512_castps_pd(add_halves((__m512)key0, (__m512)key1));
    const __m512d b = _mm512_castps_pd(add_halves((__m512)key2, (__m512)key3));
    return (F)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }

  /// O = f O + P V for kRows rows: kVectors * 16 dimensions at a time, keys in ascending order.
  template <int kRows, int kVectors>
  static void accumulate_columns(const LaneBlock& block, const PageTile& page, int hi,
                                 int64_t head_dim, const float* probabilities,
                                 const float* rescale) {
    constexpr int64_t kDims = kVectors * 16;
    Prefetch next_keys(page.next_k, page.page_bytes);
    for (int64_t d = 0; d < head_dim; d += kDims) {
      const T* v = static_cast<const T*>(page.v) + d;
      F sum[kRows][kVectors] = {};
      const auto add_step = [&](const T* a, const T* b, int64_t step)
                                __attribute__((always_inline)) {
                                  next_keys.next_lines();
                                  F words[kVectors];
                                  load_words<kVectors>(a, b, words);
#pragma GCC unroll 8
                                  for (int r = 0; r < kRows; ++r) {
                                    const F p = S::broadcast(probabilities + step * kLanes + r);
#pragma GCC unroll 2
                                    for (int i = 0; i < kVectors; ++i)
                                      sum[r][i] = Mac::mac(sum[r][i], words[i], p);
                                  }
                                };
      if constexpr (kElemsPerWord == 1) {
        for (int key = page.lo; key < hi; ++key) add_step(v + key * head_dim, nullptr, key);
      } else {
        // A row outside [lo, hi) meets a probability of 0, but may hold NaN.
        static constexpr T kZeros[kDims] = {};
        int key = page.lo;
        if (key % 2 != 0) {
          add_step(kZeros, v + key * head_dim, key / 2);
          ++key;
        }
        for (; key + 1 < hi; key += 2) {
          add_step(v + key * head_dim, v + (key + 1) * head_dim, key / 2);
        }
        if (key < hi) add_step(v + key * head_dim, kZeros, key / 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F f = S::broadcast(rescale + r);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) {
          float* o = block.o + r * head_dim + d + i * 16;
          S::store(o, S::fma(S::load(o), f, sum[r][i]));
        }
      }
    }
  }

  /// kVectors * 16 dimensions of row a, or of rows a and b in pairs (a in the low half).
  template <int kVectors>
  static Q1M_SIMD void load_words(const T* a, [[maybe_unused]] const T* b, F (&words)[kVectors]) {
    if constexpr (kElemsPerWord == 2 && kVectors == 2) {
      typedef uint16_t H32 __attribute__((vector_size(64)));
      const auto x = S::load<H32>(a), y = S::load<H32>(b);
      words[0] =
          (F)__builtin_shufflevector(x, y, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
      words[1] = (F)__builtin_shufflevector(x, y, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
                                            22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60,
                                            29, 61, 30, 62, 31, 63);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (kElemsPerWord == 2) {
          words[i] = (F)((U)S::load_bf16(a + i * 16) >> 16 | (U)S::load_bf16(b + i * 16));
        } else if constexpr (sizeof(T) == 2) {
          words[i] = S::load_bf16(a + i * 16);
        } else {
          words[i] = S::load(a + i * 16);
        }
      }
    }
  }

  using Accumulate = void(const LaneBlock&, const PageTile&, int hi, int64_t head_dim,
                          const float* probabilities, const float* rescale);
  template <int kRows>
  static void accumulate(const LaneBlock& block, const PageTile& page, int hi, int64_t head_dim,
                         const float* probabilities, const float* rescale) {
    if (head_dim % 32 == 0) {
      accumulate_columns<kRows, 2>(block, page, hi, head_dim, probabilities, rescale);
    } else {
      accumulate_columns<kRows, 1>(block, page, hi, head_dim, probabilities, rescale);
    }
  }
  template <size_t... kIndex>
  static constexpr auto accumulate_table(std::index_sequence<kIndex...>) {
    return std::array<Accumulate*, kLanes>{accumulate<kIndex + 1>...};
  }
  static constexpr std::array<Accumulate*, kLanes> kAccumulate =
      accumulate_table(std::make_index_sequence<kLanes>());

  static int64_t q_floats(int64_t head_dim) { return head_dim / kElemsPerWord * kLanes; }
  static int64_t k_pack_floats(int64_t head_dim) {
    return kConvertsKeys ? kPageSize * head_dim : 0;
  }
  static int64_t v_pack_floats(int64_t) { return 0; }

  static constexpr BlockKernel describe(CpuIsa isa) {
    return {.isa = isa,
            .dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16,
            .lanes = kLanes,
            .output = OutputLayout::kLaneDim,
            .q_floats = q_floats,
            .k_pack_floats = k_pack_floats,
            .v_pack_floats = v_pack_floats,
            .pack_queries = pack_queries,
            .pack_page = pack_page,
            .attend = attend,
            .begin = nullptr,
            .end = nullptr};
  }
};

}  // namespace
}  // namespace qwen1m
