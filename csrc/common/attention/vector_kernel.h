#pragma once
/// Block kernels (block_kernel.h) on vector registers: both matrix products of a step are a
/// register tile of R x J vectors, R broadcast words against J vectors of lanes. For S^T the R
/// words come from R keys, for O^T from R output dimensions of the packed values.

#include "common/attention/block_kernel.h"
#include "common/attention/estimate_kernel.h"
#include "common/attention/page_softmax.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// c[r][j] = sum over i < n of a[r * a_row + i * a_step] * b[i * b_step + j], the sum taken in
/// ascending i. Offsets in words.
template <typename Mac, int N, int R, int J>
Q1M_SIMD void multiply_tile(const char* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t b_step, int64_t n, typename Simd<N>::F (&c)[R][J]) {
  using S = Simd<N>;
  using F = typename S::F;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) c[r][j] = F{};
  }
  for (int64_t i = 0; i < n; ++i) {
    F lanes[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) lanes[j] = S::load(b + i * b_step + j * N);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F word = S::broadcast(a + (r * a_row + i * a_step) * 4);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) c[r][j] = Mac::mac(c[r][j], word, lanes[j]);
    }
  }
}

/// T: element of the cache. N * J lanes; R keys, and R output dimensions, per register tile.
template <typename T, typename Mac, int N, int J, int R>
struct VectorKernel {
  using S = Simd<N>;
  using F = typename S::F;
  static constexpr int kLanes = N * J;
  static constexpr int kElemsPerWord = Mac::kElemsPerWord;
  static constexpr bool kConvertsKeys = sizeof(T) == 2 && kElemsPerWord == 1;
  static_assert(kPageSize % R == 0 && R % 2 == 0 && 16 % R == 0, "D is any multiple of 16");

  static void pack_queries(const float* rows, int count, int64_t head_dim, float* q) {
    memset(q, 0, static_cast<size_t>(head_dim / kElemsPerWord * kLanes) * 4);
    for (int lane = 0; lane < count; ++lane) {
      const float* row = rows + lane * head_dim;
      for (int64_t w = 0; w < head_dim / kElemsPerWord; ++w) {
        if constexpr (kElemsPerWord == 2) {
          const uint16_t pair[2] = {bf16(row[2 * w]).bits, bf16(row[2 * w + 1]).bits};
          memcpy(q + w * kLanes + lane, pair, 4);
        } else {
          q[w * kLanes + lane] = row[w];
        }
      }
    }
  }

  /// Values become panels [D/R][128 or 64 steps][R words], so that the R words of a step lie side
  /// by side and a panel is read from front to back.
  static void pack_values(const T* v, int64_t head_dim, int lo, int hi, float* panels) {
    constexpr int64_t kSteps = kPageSize / kElemsPerWord;
    using P = Simd<R>;
    for (int key = lo / R * R; key < (hi + R - 1) / R * R; key += kElemsPerWord) {
      float* out = panels + key / kElemsPerWord * R;
      for (int64_t d = 0; d < head_dim; d += R, out += kSteps * R) {
        // Rows outside [lo, hi) meet probabilities of 0, but may hold NaN.
        const auto load = [&](int row) {
          if (row < lo || row >= hi) return typename P::F{};
          if constexpr (sizeof(T) == 4)
            return P::load(v + row * head_dim + d);
          else
            return P::load_bf16(v + row * head_dim + d);
        };
        if constexpr (kElemsPerWord == 1) {
          P::store(out, load(key));
        } else {
          using U = typename P::U;
          P::store(out,
                   (reinterpret_cast<U>(load(key)) >> 16) | reinterpret_cast<U>(load(key + 1)));
        }
      }
    }
  }

  static PageTile pack_page(const void* k, const void* v, int64_t head_dim, int lo, int hi,
                            float* k_pack, float* v_pack) {
    const int first = lo / R * R, last = (hi + R - 1) / R * R;
    if (v != nullptr) pack_values(static_cast<const T*>(v), head_dim, lo, hi, v_pack);
    PageTile page{.k = k, .v = v_pack, .k_row_words = head_dim / kElemsPerWord, .lo = lo, .hi = hi};
    if constexpr (kConvertsKeys) {
      for (int64_t i = first * head_dim; i < last * head_dim; i += N) {
        S::store(k_pack + i, S::load_bf16(static_cast<const T*>(k) + i));
      }
      page.k = k_pack;
    }
    return page;
  }

  /// scores[key][lane] of the keys returned, not masked; nothing if there are none.
  static Q1M_SIMD LaneBlock::Keys score(const LaneBlock& block, const PageTile& page,
                                        int64_t head_dim, float* scores) {
    const LaneBlock::Keys keys = block.keys(page, R);
    if (keys.hi <= page.lo) return keys;
    Prefetch next_keys(page.next_k, page.page_bytes);
    F tile[R][J];
    for (int key = keys.first; key < keys.last; key += R) {
      next_keys.next_bytes(page.page_bytes * R / (keys.last - keys.first));
      multiply_tile<Mac, N, R, J>(static_cast<const char*>(page.k) + key * page.k_row_words * 4,
                                  page.k_row_words, 1, block.q, kLanes, head_dim / kElemsPerWord,
                                  tile);
      store_tile(tile, scores + int64_t{key} * kLanes);
    }
    return keys;
  }

  static void attend(const LaneBlock& block, const PageTile& page, int64_t head_dim,
                     float* scores) {
    const LaneBlock::Keys keys = score(block, page, head_dim, scores);
    if (keys.hi <= page.lo) return;
    const int first = keys.first, last = keys.last;
    Prefetch next_values(page.next_v, page.page_bytes);
    F tile[R][J];

    alignas(64) float rescale[kLanes];
    for (int lane = 0; lane < kLanes; lane += N) {
      if (keys.some_masked) mask_scores<N>(block, page, keys, lane, scores);
      softmax_lanes<N, kElemsPerWord>(block, first, last, lane, scores, rescale);
    }

    constexpr int64_t kSteps = kPageSize / kElemsPerWord;
    const float* probabilities = scores + int64_t{first} / kElemsPerWord * kLanes;
    const char* panel = static_cast<const char*>(page.v) + int64_t{first} / kElemsPerWord * R * 4;
    for (int64_t d = 0; d < head_dim; d += R, panel += kSteps * R * 4) {
      next_values.next_bytes(page.page_bytes * R / head_dim);
      multiply_tile<Mac, N, R, J>(panel, 1, R, probabilities, kLanes,
                                  (last - first) / kElemsPerWord, tile);
      accumulate_tile(tile, rescale, block.o + d * kLanes);
    }
  }

  static Q1M_SIMD void store_tile(const F (&tile)[R][J], float* out) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) S::store(out + r * kLanes + j * N, tile[r][j]);
    }
  }
  static Q1M_SIMD void accumulate_tile(const F (&tile)[R][J], const float* rescale, float* out) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        float* o = out + r * kLanes + j * N;
        S::store(o, S::fma(S::load(o), S::load(rescale + j * N), tile[r][j]));
      }
    }
  }

  static int64_t q_floats(int64_t head_dim) { return head_dim / kElemsPerWord * kLanes; }
  static int64_t k_pack_floats(int64_t head_dim) {
    return kConvertsKeys ? kPageSize * head_dim : 0;
  }
  static int64_t v_pack_floats(int64_t head_dim) { return kPageSize * head_dim / kElemsPerWord; }

  static constexpr BlockKernel describe(CpuIsa isa) {
    return {.isa = isa,
            .dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16,
            .lanes = kLanes,
            .output = OutputLayout::kDimLane,
            .q_floats = q_floats,
            .k_pack_floats = k_pack_floats,
            .v_pack_floats = v_pack_floats,
            .pack_queries = pack_queries,
            .pack_page = pack_page,
            .attend = attend,
            .score = nullptr,
            .weigh = nullptr,
            .sum = EstimateKernel<VectorKernel, N>::sum,
            .spread = EstimateKernel<VectorKernel, N>::spread,
            .begin = nullptr,
            .end = nullptr};
  }
};

}  // namespace
}  // namespace qwen1m
