#pragma once
/// Block kernels (block_kernel.h) for the few rows of decode, AVX-512. With 2 to 8 rows the kernel
/// of vector_kernel.h would need more instructions per key than the time its bytes take to arrive,
/// so here a vector holds 2 rows x 8 words: one 256-bit broadcast of a key feeds 16 lanes, and the
/// eight partial products of a row are added at the end. The output runs along D, without packing
/// the values: pairs of value rows are interleaved in registers.
///
/// The sums run in another order than in vector_kernel.h: decode has its own bits. They are the
/// same for any number of lanes.

#include <algorithm>
#include <array>
#include <utility>

#include "common/attention/block_kernel.h"
#include "common/attention/page_softmax.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// T: element of the cache. 2 * J lanes, J = 1, 2 or 4.
template <typename T, typename Mac, int J>
struct RowKernel {
  using S = Simd<16>;
  using F = S::F;
  using U = S::U;
  using Fetch = Prefetch<3>;  // into L1: towards L2 alone it hides less (Zen 5)
  static constexpr int kLanes = 2 * J;
  static constexpr int kStep = 16;              // a step's keys are a multiple of it
  static constexpr int kKeys = J == 4 ? 4 : 8;  // keys per register tile
  static constexpr int kElemsPerWord = Mac::kElemsPerWord;
  static constexpr bool kConvertsKeys = sizeof(T) == 2 && kElemsPerWord == 1;

  /// q becomes [D/8 or D/16][J][2 rows][8 words].
  static void pack_queries(const float* rows, int count, int64_t head_dim, float* q) {
    memset(q, 0, static_cast<size_t>(q_floats(head_dim)) * 4);
    for (int lane = 0; lane < count; ++lane) {
      const float* row = rows + lane * head_dim;
      for (int64_t w = 0; w < head_dim / kElemsPerWord; ++w) {
        float* to = q + (w / 8 * J + lane / 2) * 16 + lane % 2 * 8 + w % 8;
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
      const int first = lo / kStep * kStep, last = (hi + kStep - 1) / kStep * kStep;
      for (int64_t i = first * head_dim; i < last * head_dim; i += 16) {
        S::store(k_pack + i, S::load_bf16(static_cast<const T*>(k) + i));
      }
      page.k = k_pack;
    }
    return page;
  }

  static void attend(const LaneBlock& block, const PageTile& page, int64_t head_dim,
                     float* scores) {
    score(block, page, head_dim, scores);
    weigh(block, page, head_dim, scores);
  }

  /// A key's words of all rows; a known number of them may stay in registers.
  template <int kWords, typename = void>
  struct Queries {
    F words[kWords / 8 * J];
    explicit Queries(const float* q) {
#pragma GCC unroll 64
      for (int i = 0; i < kWords / 8 * J; ++i) words[i] = S::load(q + 16 * i);
    }
    F operator()(int64_t i) const { return words[i]; }
  };
  template <typename Any>
  struct Queries<0, Any> {
    const float* q;
    explicit Queries(const float* block_q) : q(block_q) {}
    F operator()(int64_t i) const { return S::load(q + 16 * i); }
  };

  static void score(const LaneBlock& block, const PageTile& page, int64_t head_dim, float* scores) {
    if (head_dim == 64) return score_rows<64 / kElemsPerWord>(block, page, scores);
    if (head_dim == 128) return score_rows<128 / kElemsPerWord>(block, page, scores);
    score_rows<0>(block, page, scores);
  }

  /// kWords: of a key; 0: any number.
  template <int kWords>
  static void score_rows(const LaneBlock& block, const PageTile& page, float* scores) {
    const LaneBlock::Keys keys = block.keys(page, kStep);
    if (keys.hi <= page.lo) return;
    const int first = keys.first, last = keys.last;
    Fetch next_keys(page.next_k, page.page_bytes);  // as many bytes at a time as are read here
    const int64_t row_bytes = (kWords == 0 ? page.k_row_words : kWords) * 4;
    Queries<kWords> q(block.q);
    for (int key = first; key < last; key += kKeys) {
      score_keys(static_cast<const char*>(page.k) + key * row_bytes, row_bytes, q,
                 scores + key * kLanes, next_keys);
    }
    if (keys.some_masked) mask_scores<kLanes>(block, page, keys, 0, scores);
  }

  static void weigh(const LaneBlock& block, const PageTile& page, int64_t head_dim, float* scores) {
    const LaneBlock::Keys keys = block.keys(page, kStep);
    if (keys.hi <= page.lo) return;
    alignas(64) float rescale[kLanes];
    softmax(block, keys.first, keys.last, scores, rescale);
    Fetch next_values(page.next_v, page.page_bytes);
    kAccumulate[block.rows - 1](block, page, keys.hi, head_dim, scores, rescale, next_values);
  }

  /// scores[key][lane] of kKeys keys. Where a key's length is known, memory is read in its order,
  /// which is what the hardware's own prefetchers go by (Zen 5; word by word of 8 keys without any
  /// prefetch takes 1.2 times as long).
  template <int kWords>
  static Q1M_SIMD void score_keys(const char* keys, int64_t row_bytes, const Queries<kWords>& q,
                                  float* scores, Fetch& next_keys) {
    F c[kKeys * J] = {};
    const auto add = [&](int r, int64_t w) __attribute__((always_inline)) {
      const F words = (F)_mm512_broadcast_f32x8(
          _mm256_loadu_ps(reinterpret_cast<const float*>(keys + r * row_bytes + w * 32)));
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) c[r * J + j] = Mac::mac(c[r * J + j], words, q(w * J + j));
    };
    if constexpr (kWords == 0) {
      for (int64_t w = 0; w < row_bytes / 32; ++w) {
        next_keys.next_bytes<kKeys * 32>();
#pragma GCC unroll 8
        for (int r = 0; r < kKeys; ++r) add(r, w);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kKeys; ++r) {
        next_keys.next_bytes<kWords * 4>();
#pragma GCC unroll 16
        for (int w = 0; w < kWords / 8; ++w) add(r, w);
      }
    }
    if constexpr (J == 1) {
      // From [keys 0-3: row 0, row 1; keys 4-7: row 0, row 1] to [8 keys][2 rows].
      const F sums = add_words<1>(c);
      S::store(scores, __builtin_shufflevector(sums, sums, 0, 4, 1, 5, 2, 6, 3, 7,  //
                                               8, 12, 9, 13, 10, 14, 11, 15));
    } else if constexpr (J == 2) {
      // From [4 rows][4 keys] to [4 keys][4 rows].
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const F sums = add_words<2>(c + 8 * r);
        S::store(scores + 16 * r, __builtin_shufflevector(sums, sums, 0, 4, 8, 12, 1, 5, 9, 13,  //
                                                          2, 6, 10, 14, 3, 7, 11, 15));
      }
    } else {
      // From [4 rows][4 keys] twice to [4 keys][8 rows].
      const F a = add_words<4>(c), b = add_words<4>(c + 2);
      S::store(scores, __builtin_shufflevector(a, b, 0, 4, 8, 12, 16, 20, 24, 28,  //
                                               1, 5, 9, 13, 17, 21, 25, 29));
      S::store(scores + 16, __builtin_shufflevector(a, b, 2, 6, 10, 14, 18, 22, 26, 30,  //
                                                    3, 7, 11, 15, 19, 23, 27, 31));
    }
  }

  /// Adds the words of 8 vectors [2 rows][8 words]: of keys 0 to 3 `stride` apart at c, then of the
  /// same keys' next two rows or, with a stride of 1, of keys 4 to 7. The result is
  /// [first or second four][2 rows][4 keys].
  template <int kStride>
  static Q1M_SIMD F add_words(const F* c) {
    constexpr int kSecond = kStride == 1 ? 4 : 1;
    const __m512 a = add_quarters(c[0], c[kStride], c[2 * kStride], c[3 * kStride]);
    const __m512 b = add_quarters(c[kSecond], c[kSecond + kStride], c[kSecond + 2 * kStride],
                                  c[kSecond + 3 * kStride]);
    return (F)_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0b10'00'10'00),
                            _mm512_shuffle_f32x4(a, b, 0b11'01'11'01));
  }
  /// The sums of each four words of four vectors: [2 rows][2 fours][4 keys].
  static Q1M_SIMD __m512 add_quarters(F key0, F key1, F key2, F key3) {
    const auto add_halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d a = _mm512_castps_pd(add_halves((__m512)key0, (__m512)key1));
    const __m512d b = _mm512_castps_pd(add_halves((__m512)key2, (__m512)key3));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }

  /// softmax_lanes of page_softmax.h with a vector full of scores: [16 / kLanes keys][kLanes rows].
  static Q1M_SIMD void softmax(const LaneBlock& block, int first, int last, float* scores,
                               float* rescale) {
    constexpr int kDegree = kElemsPerWord == 2 ? 3 : 5;
    const F scale = every_key(block.log2_scale);
    const float* const end = scores + last * kLanes;

    const F m_old = every_key(block.m);
    F m0 = S::splat(-std::numeric_limits<float>::infinity()), m1 = m0;
    for (const float* row = scores + first * kLanes; row != end; row += 32) {
      m0 = S::max(S::load(row), m0);
      m1 = S::max(S::load(row + 16), m1);
    }
    const auto max = [](F a, F b) __attribute__((always_inline)) { return S::max(a, b); };
    const F m_new = S::max(over_keys(S::max(m0, m1), max), m_old);
    // While a row has seen nothing but -inf, m stays -inf; a finite stand-in avoids inf - inf.
    const F reference = S::max(m_new, S::splat(-std::numeric_limits<float>::max()));
    const F f = S::template exp2<5>((m_old - reference) * scale);

    // Subtract, then scale: the largest key gets a probability of exactly 1. Word i of a row goes
    // to the same one of 8 sums for any number of lanes, and these are added in the same order.
    F sums[J] = {};
    float* to = scores + first / kElemsPerWord * kLanes;
    for (const float* row = scores + first * kLanes; row != end;) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j, row += 16 * kElemsPerWord, to += 16) {
        F words = S::template exp2<kDegree>((S::load(row) - reference) * scale);
        if constexpr (kElemsPerWord == 2) {
          words = Mac::template round_to_pairs<kLanes>(
              words, S::template exp2<kDegree>((S::load(row + 16) - reference) * scale));
        }
        S::store(to, words);  // not ahead of what is still to be read
        sums[j] = Mac::mac(sums[j], words, Mac::ones());
      }
    }
#pragma GCC unroll 2
    for (int n = J / 2; n > 0; n /= 2) {
#pragma GCC unroll 2
      for (int j = 0; j < n; ++j) sums[j] += sums[j + n];
    }
    const auto add = [](F a, F b) __attribute__((always_inline)) { return a + b; };
    const F l = S::fma(every_key(block.l), f, over_keys(sums[0], add));
    store_lanes(block.m, m_new);
    store_lanes(block.l, l);
    store_lanes(rescale, f);
  }

  /// [kLanes rows] for each key of a vector.
  static Q1M_SIMD F every_key(const float* lanes) {
    if constexpr (J == 1) return (F)_mm512_set1_pd(*reinterpret_cast<const double*>(lanes));
    if constexpr (J == 2) return (F)_mm512_broadcast_f32x4(_mm_load_ps(lanes));
    return (F)_mm512_broadcast_f32x8(_mm256_load_ps(lanes));
  }
  static Q1M_SIMD void store_lanes(float* to, F x) { memcpy(to, &x, sizeof(float) * kLanes); }
  /// `op` of the keys of a vector, in every key's place: halves, then quarters, then eighths.
  template <typename Op>
  static Q1M_SIMD F over_keys(F x, Op op) {
    x = op(x, (F)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0b01'00'11'10));
    if constexpr (J <= 2) x = op(x, (F)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0b10'11'00'01));
    if constexpr (J == 1) x = op(x, (F)_mm512_permute_ps((__m512)x, 0b01'00'11'10));
    return x;
  }

  /// O = f O + P V for kRows rows: kVectors * 16 dimensions at a time, keys in ascending order.
  template <int kRows, int kVectors>
  static void accumulate_columns(const LaneBlock& block, const PageTile& page, int hi,
                                 int64_t head_dim, const float* probabilities, const float* rescale,
                                 Fetch& next_values) {
    constexpr int64_t kDims = kVectors * 16;
    constexpr auto kStepBytes = static_cast<int64_t>(kDims * sizeof(T) * kElemsPerWord);
    for (int64_t d = 0; d < head_dim; d += kDims) {
      F sum[kRows][kVectors] = {};
      const auto add_step = [&](const T* a, const T* b, const float* p)
                                __attribute__((always_inline)) {
                                  next_values.next_bytes<kStepBytes>();
                                  F words[kVectors];
                                  load_words<kVectors>(a, b, words);
#pragma GCC unroll 8
                                  for (int r = 0; r < kRows; ++r) {
                                    const F probability = S::broadcast(p + r);
#pragma GCC unroll 4
                                    for (int i = 0; i < kVectors; ++i)
                                      sum[r][i] = Mac::mac(sum[r][i], words[i], probability);
                                  }
                                };
      const T* row = static_cast<const T*>(page.v) + page.lo * head_dim + d;
      const float* p = probabilities + page.lo / kElemsPerWord * kLanes;
      int keys = hi - page.lo;
      if constexpr (kElemsPerWord == 1) {
        for (; keys > 0; --keys, row += head_dim, p += kLanes) add_step(row, nullptr, p);
      } else {
        // A row outside [lo, hi) meets a probability of 0, but may hold NaN.
        static constexpr T kZeros[kDims] = {};
        if (page.lo % 2 != 0) {
          add_step(kZeros, row, p);
          --keys, row += head_dim, p += kLanes;
        }
        for (; keys > 1; keys -= 2, row += 2 * head_dim, p += kLanes)
          add_step(row, row + head_dim, p);
        if (keys > 0) add_step(row, kZeros, p);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F f = S::broadcast(rescale + r);
        sort_words<kVectors>(sum[r]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          float* o = block.o + r * head_dim + d + i * 16;
          S::store(o, S::fma(S::load(o), f, sum[r][i]));
        }
      }
    }
  }

  /// kVectors * 16 dimensions of row a, or of rows a and b in pairs (a in the low half). Pairs of
  /// 32 dimensions come in the order of the cheapest instruction, 4 of each 8 in either vector:
  /// sort_words puts their sums right. (Permutations cost a product each on Zen 4, these nothing.)
  template <int kVectors>
  static Q1M_SIMD void load_words(const T* a, [[maybe_unused]] const T* b, F (&words)[kVectors]) {
    if constexpr (kElemsPerWord == 2 && kVectors > 1) {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        const __m512i x = _mm512_loadu_si512(a + 16 * i), y = _mm512_loadu_si512(b + 16 * i);
        words[i] = (F)_mm512_unpacklo_epi16(x, y);
        words[i + 1] = (F)_mm512_unpackhi_epi16(x, y);
      }
    } else {
#pragma GCC unroll 4
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
  template <int kVectors>
  static Q1M_SIMD void sort_words(F (&sums)[kVectors]) {
    if constexpr (kElemsPerWord == 2 && kVectors > 1) {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        const F low = sums[i], high = sums[i + 1];
        sums[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19,  //
                                          4, 5, 6, 7, 20, 21, 22, 23);
        sums[i + 1] = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27,  //
                                              12, 13, 14, 15, 28, 29, 30, 31);
      }
    }
  }

  using Accumulate = void(const LaneBlock&, const PageTile&, int hi, int64_t head_dim,
                          const float* probabilities, const float* rescale, Fetch&);
  template <int kRows>
  static void accumulate(const LaneBlock& block, const PageTile& page, int hi, int64_t head_dim,
                         const float* probabilities, const float* rescale, Fetch& next_values) {
    // As many sums at a time as a product's latency needs and registers hold.
    if (kRows <= 4 && head_dim % 64 == 0) {
      accumulate_columns<kRows, kRows <= 4 ? 4 : 2>(block, page, hi, head_dim, probabilities,
                                                    rescale, next_values);
    } else if (head_dim % 32 == 0) {
      accumulate_columns<kRows, 2>(block, page, hi, head_dim, probabilities, rescale, next_values);
    } else {
      accumulate_columns<kRows, 1>(block, page, hi, head_dim, probabilities, rescale, next_values);
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
            .score = score,
            .weigh = weigh,
            .sum = nullptr,
            .spread = nullptr,
            .begin = nullptr,
            .end = nullptr};
  }
};

}  // namespace
}  // namespace qwen1m
