#pragma once
/// The steps of the sparse estimate (BlockKernel::sum and ::spread) over the scores of any block
/// kernel. Probabilities stay fp32 whatever the kernel multiplies: they are compared, not summed
/// into an output.

#include <algorithm>
#include <limits>

#include "common/attention/block_kernel.h"
#include "common/attention/page_softmax.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// Kernel::score leaves scores[key][kLanes] of the keys it returns; N lanes of a vector.
template <typename Kernel, int N>
struct EstimateKernel {
  using S = Simd<N>;
  using F = typename S::F;
  static constexpr int kLanes = Kernel::kLanes;
  static constexpr int kPad = 16;  // zeros on both sides of a row of probabilities
  static constexpr int64_t kRow = kLanes + 2 * kPad;
  static_assert(N <= kPad);

  static LaneBlock::Keys masked_scores(const LaneBlock& block, const PageTile& page,
                                       int64_t head_dim, float* scores) {
    const LaneBlock::Keys keys = Kernel::score(block, page, head_dim, scores);
    if (keys.hi > page.lo && keys.some_masked) {
      for (int lane = 0; lane < kLanes; lane += N) mask_scores<N>(block, page, keys, lane, scores);
    }
    return keys;
  }

  static void sum(const LaneBlock& block, const PageTile& page, int64_t head_dim, float* scores) {
    const LaneBlock::Keys keys = masked_scores(block, page, head_dim, scores);
    if (keys.hi <= page.lo) return;
    for (int lane = 0; lane < kLanes; lane += N) {
      const F scale = S::load(block.log2_scale + lane);
      const F m_old = S::load(block.m + lane);
      F m_new = m_old;
      for (int key = keys.first; key < keys.last; ++key) {
        m_new = S::max(S::load(scores + int64_t{key} * kLanes + lane), m_new);
      }
      const F reference = S::max(m_new, S::splat(-std::numeric_limits<float>::max()));
      F sums[2] = {};
      for (int key = keys.first; key < keys.last; key += 2) {
        const float* row = scores + int64_t{key} * kLanes + lane;
        sums[0] += S::template exp2<5>((S::load(row) - reference) * scale);
        sums[1] += S::template exp2<5>((S::load(row + kLanes) - reference) * scale);
      }
      const F f = S::template exp2<5>((m_old - reference) * scale);
      S::store(block.m + lane, m_new);
      S::store(block.l + lane, S::fma(S::load(block.l + lane), f, sums[0] + sums[1]));
    }
  }

  static void spread(const LaneBlock& block, const PageTile& page, int64_t head_dim, float* scores,
                     float* column, float* slash) {
    const LaneBlock::Keys keys = masked_scores(block, page, head_dim, scores);
    if (keys.hi <= page.lo) return;
    float* probabilities = scores + kPageSize * kLanes + kPad;
    for (int key = keys.first; key < keys.last; ++key) {
      F sum{};
      for (int lane = 0; lane < kLanes; lane += N) {
        const F reference =
            S::max(S::load(block.m + lane), S::splat(-std::numeric_limits<float>::max()));
        const F s = S::load(scores + int64_t{key} * kLanes + lane);
        const F p = S::template exp2<5>((s - reference) * S::load(block.log2_scale + lane)) *
                    S::load(block.l + lane);
        S::store(probabilities + key * kRow + lane, p);
        sum += p;
      }
      column[key] += S::sum(sum);
    }
    // Diagonal d holds lane r of key r + 127 - d: a vector of diagonals walks down the keys with
    // lanes that move along by one, zeros beside the row.
    for (int d = 0; d < kPageSize - 1 + kLanes; d += N) {
      const int begin = std::max<int>(keys.first, kPageSize - 1 - d - (N - 1));
      const int end = std::min<int>(keys.last, kPageSize - 1 - d + kLanes);
      F sums[2] = {};
      int key = begin;
      const auto at = [&](int k) { return S::load(probabilities + k * kRow + (d + k - 127)); };
      for (; key + 1 < end; key += 2) {
        sums[0] += at(key);
        sums[1] += at(key + 1);
      }
      if (key < end) sums[0] += at(key);
      S::store(slash + d, S::load(slash + d) + (sums[0] + sums[1]));
    }
  }
};

}  // namespace
}  // namespace qwen1m
