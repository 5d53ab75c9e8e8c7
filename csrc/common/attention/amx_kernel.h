#pragma once
/// The block kernel (block_kernel.h) on AMX tiles, over the seam of amx_tiles.h.
/// Compiled; tested with software tiles; not run on AMX hardware by this project yet.
///
/// A block is 48 lanes: three B operands of 16 lanes, tiles 4-6, with the accumulators 0-2; tile 3
/// is the A operand. Per A tile that is 4 loads (8 cycles each on Sapphire Rapids) for 3 products
/// (16 cycles each), so the multiplier is the bound.
///   S^T = K Q^T    A: 16 keys of 32 dims, rows of the cache page      B: q, [16 pairs][16 lanes]
///   O^T += V^T P^T A: 16 dims of 32 keys, packed by pack_page         B: p, [16 pairs][16 lanes]

#include <utility>

#include "common/attention/amx_tiles.h"
#include "common/attention/block_kernel.h"
#include "common/attention/estimate_kernel.h"
#include "common/attention/page_softmax.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// N: vector lanes of the softmax.
template <typename Tiles, int N>
struct AmxKernel {
  using S = Simd<N>;
  using F = typename S::F;
  static constexpr int kLanes = 48;
  static constexpr int kKeyStep = 32;
  static constexpr int64_t kLaneBytes = kLanes * 4;
  static constexpr int64_t kPanelWords = 16 * 16;  // 16 dims of 32 keys

  /// Dimensions of a padded row: a multiple of the 32 that a tile row holds.
  static constexpr int64_t padded(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

  static void pack_queries(const float* rows, int count, int64_t head_dim, float* q) {
    memset(q, 0, static_cast<size_t>(padded(head_dim) / 2 * kLaneBytes));
    for (int lane = 0; lane < count; ++lane) {
      const float* row = rows + lane * head_dim;
      for (int64_t w = 0; w < head_dim / 2; ++w) {
        const uint16_t pair[2] = {bf16(row[2 * w]).bits, bf16(row[2 * w + 1]).bits};
        memcpy(q + w * kLanes + lane, pair, 4);
      }
    }
  }

  /// Values to [D/16][128/32] panels of [16 dims][16 pairs of keys].
  static PageTile pack_page(const void* k, const void* v, int64_t head_dim, int lo, int hi,
                            float* k_pack, float* v_pack) {
    const int first = lo / kKeyStep * kKeyStep;
    const int last = (hi + kKeyStep - 1) / kKeyStep * kKeyStep;
    const auto* rows = static_cast<const uint16_t*>(v);
    for (int64_t d = 0; d < head_dim && v != nullptr; d += 16) {
      // Rows outside [lo, hi) meet probabilities of 0, but may hold NaN.
      const auto row = [&](int key) {
        return key >= lo && key < hi ? rows + key * head_dim + d : kZeros;
      };
      for (int key = first; key < last; key += kKeyStep) {
        float* panel = v_pack + (d / 16 * (kPageSize / kKeyStep) + key / kKeyStep) * kPanelWords;
        for (int pair = 0; pair < 16; ++pair) {
          interleave(row(key + 2 * pair), row(key + 2 * pair + 1), panel + pair * 16);
        }
        transpose(panel);
      }
    }
    PageTile page{.k = k, .v = v_pack, .k_row_words = head_dim / 2, .lo = lo, .hi = hi};
    if (head_dim % 32 != 0) {
      // The last tile of a row would read into the next one, which may be NaN.
      memset(k_pack, 0, static_cast<size_t>(kPageSize * padded(head_dim)) * 2);
      for (int key = first; key < last; ++key) {
        memcpy(reinterpret_cast<char*>(k_pack) + key * padded(head_dim) * 2,
               static_cast<const uint16_t*>(k) + key * head_dim, static_cast<size_t>(head_dim) * 2);
      }
      page.k = k_pack;
      page.k_row_words = padded(head_dim) / 2;
    }
    return page;
  }

  /// out[i] = the pair (a[i], b[i]), a in the low half; 16 of them.
  static Q1M_SIMD void interleave(const uint16_t* a, const uint16_t* b, float* out) {
    using U = typename S::U;
    for (int i = 0; i < 16; i += N) {
      S::store(out + i, (U)S::load_bf16(a + i) >> 16 | (U)S::load_bf16(b + i));
    }
  }

  /// 16 x 16 words in place.
  static void transpose(float* words) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      __m512i r[16], t[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(words + i * 16);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(words + i * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(words + (i + 8) * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
      }
      return;
    }
#endif
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < i; ++j) std::swap(words[i * 16 + j], words[j * 16 + i]);
    }
  }

  /// scores[key][lane] of the keys returned, not masked; nothing if there are none.
  static LaneBlock::Keys score(const LaneBlock& block, const PageTile& page, int64_t head_dim,
                               float* scores) {
    const LaneBlock::Keys keys = block.keys(page, kKeyStep);
    if (keys.hi <= page.lo) return keys;
    const int64_t k_row_bytes = page.k_row_words * 4;
    for (int key = keys.first; key < keys.last; key += 16) {
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      const char* rows = static_cast<const char*>(page.k) + key * k_row_bytes;
      for (int64_t w = 0; w < padded(head_dim) / 2; w += 16) {
        Tiles::template load<3>(rows + w * 4, k_row_bytes);
        multiply_lanes(block.q + w * kLanes);
      }
      store_lanes(scores + int64_t{key} * kLanes);
    }
    return keys;
  }

  static void attend(const LaneBlock& block, const PageTile& page, int64_t head_dim,
                     float* scores) {
    const LaneBlock::Keys keys = score(block, page, head_dim, scores);
    if (keys.hi <= page.lo) return;
    const int first = keys.first, last = keys.last;

    alignas(64) float rescale[kLanes];
    for (int lane = 0; lane < kLanes; lane += N) {
      if (keys.some_masked) mask_scores<N>(block, page, keys, lane, scores);
      softmax_lanes<N, 2>(block, first, last, lane, scores, rescale);
    }
    rescale_output(rescale, head_dim, block.o);

    for (int64_t d = 0; d < head_dim; d += 16) {
      float* o = block.o + d * kLanes;
      Tiles::template load<0>(o, kLaneBytes);
      Tiles::template load<1>(o + 16, kLaneBytes);
      Tiles::template load<2>(o + 32, kLaneBytes);
      const float* panels =
          static_cast<const float*>(page.v) + d / 16 * (kPageSize / 32) * kPanelWords;
      for (int key = first; key < last; key += kKeyStep) {
        Tiles::template load<3>(panels + key / kKeyStep * kPanelWords, 64);
        multiply_lanes(scores + int64_t{key} / 2 * kLanes);
      }
      store_lanes(o);
    }
  }

  /// Accumulators += tile 3 times 16 word rows of 48 lanes.
  static void multiply_lanes(const float* words) {
    Tiles::template load<4>(words, kLaneBytes);
    Tiles::template multiply<0, 3, 4>();
    Tiles::template load<5>(words + 16, kLaneBytes);
    Tiles::template multiply<1, 3, 5>();
    Tiles::template load<6>(words + 32, kLaneBytes);
    Tiles::template multiply<2, 3, 6>();
  }
  static void store_lanes(float* out) {
    Tiles::template store<0>(out, kLaneBytes);
    Tiles::template store<1>(out + 16, kLaneBytes);
    Tiles::template store<2>(out + 32, kLaneBytes);
  }

  /// A pass over the output that is left out where every factor is 1, as in most steps of a long
  /// sequence; multiplying by 1 is exact, so a lane does not notice whether it was.
  static void rescale_output(const float* rescale, int64_t head_dim, float* o) {
    bool all_one = true;
    for (int lane = 0; lane < kLanes; ++lane) all_one &= rescale[lane] == 1.0f;
    if (all_one) return;
    for (int64_t d = 0; d < head_dim; ++d, o += kLanes) {
      for (int lane = 0; lane < kLanes; lane += N) {
        S::store(o + lane, S::load(o + lane) * S::load(rescale + lane));
      }
    }
  }

  static int64_t q_floats(int64_t head_dim) { return padded(head_dim) / 2 * kLanes; }
  static int64_t k_pack_floats(int64_t head_dim) {
    return head_dim % 32 == 0 ? 0 : kPageSize * padded(head_dim) / 2;
  }
  static int64_t v_pack_floats(int64_t head_dim) { return kPageSize * head_dim / 2; }

  static constexpr BlockKernel describe(CpuIsa isa) {
    return {.isa = isa,
            .dtype = DType::kBFloat16,
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
            .sum = EstimateKernel<AmxKernel, N>::sum,
            .spread = EstimateKernel<AmxKernel, N>::spread,
            .begin = Tiles::configure,
            .end = Tiles::restore};
  }

 private:
  static constexpr uint16_t kZeros[16] = {};
};

}  // namespace
}  // namespace qwen1m
