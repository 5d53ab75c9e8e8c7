#pragma once
/// What the GPU kernels of prefill attention, dense and sparse, do with rows: rotate queries into
/// shared memory, mask and exponentiate scores, write outputs. A thread holds scores and outputs in
/// the accumulator layout that wgmma and mma.sync share: x[4 j + 2 h + e] is row `lane / 4 + 8 h`
/// of 16, column 8 j + 2 (lane % 4) + e.

#include <cmath>

#include "arch/arch.h"
#include "common/attention/prefill_tile.h"

namespace qwen1m {

/// A tile of kNumRows rows of kHeadDim dims in shared memory: panels of 64 dims (128 bytes), each
/// panel [kNumRows][64] with the 128-byte swizzle, so that 8 rows of one 16-byte column lie in
/// distinct banks. Rows of 32 dims are one panel with the 64-byte swizzle, to the same end.
template <int kHeadDim, int kNumRows = static_cast<int>(kTileTokens)>
struct RowTile {
  static constexpr uint32_t kPanelBytes = kNumRows * 128;
  using Storage = uint16_t[kNumRows * kHeadDim];
  arch::Shared<Storage> storage;

  /// 16 bytes of a row: dims [8 chunk, 8 chunk + 8).
  Q1M_DEVICE arch::Shared<arch::Vec16> at(int row, int chunk) const {
    if constexpr (kHeadDim == 32) {
      return {storage.address +
              arch::swizzled_64(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk) * 16)};
    }
    return {storage.address + static_cast<uint32_t>(chunk / 8) * kPanelBytes +
            arch::swizzled_128(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk % 8) * 16)};
  }
};

/// Two dims d, d + 1 of the lower half and their partners of the upper one; cs: cos, sin of both.
Q1M_DEVICE void rotate_pair(const arch::Vec16& cs, uint32_t& low, uint32_t& high) {
  const float c0 = arch::as_float(cs.word[0]), s0 = arch::as_float(cs.word[1]);
  const float c1 = arch::as_float(cs.word[2]), s1 = arch::as_float(cs.word[3]);
  const float x0 = arch::bf16_low(low), x1 = arch::bf16_high(low);
  const float y0 = arch::bf16_low(high), y1 = arch::bf16_high(high);
  low = arch::pack_bf16(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
  high = arch::pack_bf16(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
}

/// Rotates queries [first_row, first_row + num_rows) of the tile to a stage's position, in fp32
/// with one rounding, by `num_threads` threads of which this is number `thread`. Rows that are not
/// there become zero. The caller orders the writes before the reads.
template <int kHeadDim, int kTileRows, typename Params>
Q1M_DEVICE void rotate_queries(const Params& p, const PrefillTile& tile, int stage,
                               RowTile<kHeadDim, kTileRows> to, int first_row, int num_rows,
                               int thread, int num_threads) {
  constexpr int kChunks = kHeadDim / 16;  // of 8 dims, in one half of a row
  const auto q = p.q.template as<const bf16>();
  Q1M_NO_UNROLL
  for (int i = arch::opaque(thread); i < num_rows * kChunks; i += num_threads) {
    const int row = first_row + i / kChunks, chunk = i % kChunks;
    arch::Vec16 low = {}, high = {};
    if (tile.has_row(row)) {
      const bf16* from = q.at(tile.row + row, tile.q_head, chunk * 8);
      low = arch::global_load(reinterpret_cast<const arch::Vec16*>(from));
      high = arch::global_load(reinterpret_cast<const arch::Vec16*>(from + kHeadDim / 2));
      const int64_t position = query_position(p, stage, int64_t{tile.first_token} + row);
      const float* table = p.rope_table.at(position, chunk * 8);  // (cos, sin) pairs
      Q1M_UNROLL
      for (int w = 0; w < 4; ++w) {
        const auto cs = arch::global_load(reinterpret_cast<const arch::Vec16*>(table + 4 * w));
        rotate_pair(cs, low.word[w], high.word[w]);
      }
    }
    arch::shared_store(to.at(row, chunk), low);
    arch::shared_store(to.at(row, chunk + kChunks), high);
  }
}

/// The online softmax of a thread's two rows (arXiv:1805.02867).
struct RowSoftmax {
  float m[2] = {-INFINITY, -INFINITY};  // maximum of the raw scores so far
  float l[2] = {0, 0};                  // sum of exp2(scale (s - m)), this thread's columns only
  float alpha[2];                       // factor of what was summed before the last step

  /// s becomes exp2(scale_log2 (s - m)) with the new maximum; a masked score is exp2(-inf) = 0.
  /// kEmptyRows: a row may have seen no key yet, and has m = -inf then; else m is finite from the
  /// first block on.
  template <bool kEmptyRows, int kCount>
  Q1M_DEVICE void step(float (&s)[kCount], float scale_log2) {
    step<kEmptyRows>(s, {scale_log2, scale_log2});
  }
  /// The two rows with a scale each.
  template <bool kEmptyRows, int kCount>
  Q1M_DEVICE void step(float (&s)[kCount], const float (&scale_log2)[2]) {
    Q1M_UNROLL
    for (int h = 0; h < 2; ++h) {
      float maximum = m[h];
      Q1M_UNROLL
      for (int j = 0; j < kCount / 4; ++j) {
        maximum = fmaxf(maximum, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      }
      maximum = fmaxf(maximum, arch::shuffle_xor(maximum, 1));  // the four lanes of a row
      maximum = fmaxf(maximum, arch::shuffle_xor(maximum, 2));
      const float reference =
          kEmptyRows && maximum == -INFINITY ? 0.0f : maximum * scale_log2[h];  // no -inf - (-inf)
      alpha[h] = arch::exp2_approx(m[h] * scale_log2[h] - reference);
      float sum = 0;
      Q1M_UNROLL
      for (int j = 0; j < kCount / 4; ++j) {
        Q1M_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * h + e];
          x = arch::exp2_approx(x * scale_log2[h] - reference);
          sum += x;
        }
      }
      l[h] = l[h] * alpha[h] + sum;
      m[h] = maximum;
    }
  }
  template <int kCount>
  Q1M_DEVICE void rescale(float (&o)[kCount]) const {
    Q1M_UNROLL
    for (int i = 0; i < kCount; ++i) o[i] *= alpha[(i >> 1) & 1];
  }

  /// Ends the softmax of rows `row` and `row + 8` of the tile: writes lse, normalises o. A row
  /// without keys has o = 0 and lse = -inf.
  template <typename Params, int kCount>
  Q1M_DEVICE void finish(const Params& p, const PrefillTile& tile, int row, float logit_scale,
                         float (&o)[kCount]) {
    constexpr float kLn2 = 0.69314718f;
    float norm[2];
    Q1M_UNROLL
    for (int h = 0; h < 2; ++h) {
      l[h] += arch::shuffle_xor(l[h], 1);
      l[h] += arch::shuffle_xor(l[h], 2);
      norm[h] = l[h] == 0 ? 0.0f : arch::reciprocal_approx(l[h]);
      if (p.lse && arch::lane_index() % 4 == 0 && tile.has_row(row + 8 * h)) {
        arch::global_store(p.lse.at(tile.row + row + 8 * h, tile.q_head),
                           m[h] * logit_scale + arch::log2_approx(l[h]) * kLn2);
      }
    }
    Q1M_UNROLL
    for (int i = 0; i < kCount; ++i) o[i] *= norm[(i >> 1) & 1];
  }
};

/// The accumulator layout of scores is the A operand layout of probabilities: 16 keys are two
/// groups of columns.
template <int kKeys>
Q1M_DEVICE void pack_probabilities(uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
  Q1M_UNROLL
  for (int step = 0; step < kKeys / 16; ++step) {
    Q1M_UNROLL
    for (int r = 0; r < 4; ++r) {
      p[step][r] = arch::pack_bf16(s[8 * step + 2 * r], s[8 * step + 2 * r + 1]);
    }
  }
}

/// Writes 16 output rows that the warp has put into the tile, 16 bytes a lane; rows that are not
/// there are left alone.
template <int kHeadDim, typename Params>
Q1M_DEVICE void store_rows(const Params& p, const PrefillTile& tile, RowTile<kHeadDim> from,
                           int first_row) {
  constexpr int kChunks = kHeadDim / 8;
  const auto out = p.out.template as<bf16>();
  Q1M_UNROLL
  for (int i = arch::opaque(arch::lane_index()); i < 16 * kChunks; i += 32) {
    const int row = first_row + i / kChunks, chunk = i % kChunks;
    if (!tile.has_row(row)) continue;
    const arch::Vec16 value = arch::shared_load(from.at(row, chunk));
    bf16* to = out.at(tile.row + row, tile.q_head, chunk * 8);
    arch::global_store(reinterpret_cast<arch::Vec16*>(to), value);
  }
}

}  // namespace qwen1m
