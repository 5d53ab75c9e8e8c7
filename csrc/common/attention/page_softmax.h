#pragma once
/// The softmax of one step (block_kernel.h): scores of one page in, probabilities out, in place.

#include <limits>

#include "common/attention/block_kernel.h"
#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

/// Rounds two rows of probabilities to bf16 and interleaves them: lane i of the result is the pair
/// (a[i], b[i]), a in the low half. Half-way cases go up; p >= 0, so no sign is in the way.
/// a and b are replaced by their rounded values.
template <int N>
Q1M_SIMD typename Simd<N>::U round_to_pair(typename Simd<N>::F& a, typename Simd<N>::F& b) {
  using U = typename Simd<N>::U;
  using F = typename Simd<N>::F;
  const U ua = (reinterpret_cast<U>(a) + 0x8000u) & 0xffff0000u;
  const U ub = (reinterpret_cast<U>(b) + 0x8000u) & 0xffff0000u;
  a = reinterpret_cast<F>(ua);
  b = reinterpret_cast<F>(ub);
  return (ua >> 16) | ub;
}

/// Scores of keys that a row may not see become -inf, for lanes [lane, lane + N).
template <int N>
Q1M_SIMD void mask_scores(const LaneBlock& block, const PageTile& page, const LaneBlock::Keys& keys,
                          int lane, float* scores) {
  using S = Simd<N>;
  using I = typename S::I;
  using F = typename S::F;
  // A page lies at most this far ahead of or behind the rows that visit it, seen in 32 bits.
  const int64_t ahead = block.first_token - page.begin;
  const int32_t base =
      ahead > kPageSize ? static_cast<int32_t>(kPageSize) : static_cast<int32_t>(ahead);
  const I last_key = S::template load<I>(block.token_offset + lane) + base;
  const F masked = S::splat(-std::numeric_limits<float>::infinity());
  for (int key = keys.first; key < keys.last; ++key) {
    float* row = scores + int64_t{key} * block.lanes + lane;
    const bool in_range = key >= page.lo && key < keys.hi;
    S::store(row, in_range ? (last_key >= key ? S::load(row) : masked) : masked);
  }
}

/// Lanes [lane, lane + N): turns the scores of keys [first, last) into probabilities, as floats
/// [key][lanes] or as pairs of bf16 [key/2][lanes], over the scores. `first` and `last` are even.
/// Updates m and l; `rescale` receives f.
template <int N, int kElemsPerWord>
Q1M_SIMD void softmax_lanes(const LaneBlock& block, int first, int last, int lane, float* scores,
                            float* rescale) {
  using S = Simd<N>;
  using F = typename S::F;
  constexpr int kDegree = kElemsPerWord == 2 ? 3 : 5;
  const int64_t stride = block.lanes;
  const F scale = S::load(block.log2_scale + lane);

  const F m_old = S::load(block.m + lane);
  F m0 = S::splat(-std::numeric_limits<float>::infinity()), m1 = m0;
  for (int key = first; key < last; key += 2) {  // max is associative: two chains, same result
    m0 = S::max(S::load(scores + key * stride + lane), m0);
    m1 = S::max(S::load(scores + (key + 1) * stride + lane), m1);
  }
  const F m_new = S::max(S::max(m0, m1), m_old);
  // While a row has seen nothing but -inf, m stays -inf; a finite stand-in avoids inf - inf.
  const F reference = S::max(m_new, S::splat(-std::numeric_limits<float>::max()));
  const F f = S::template exp2<5>((m_old - reference) * scale);

  // Subtract, then scale: the largest key gets a probability of exactly 1.
  F sum{};
  for (int key = first; key < last; key += 2) {
    const float* row = scores + key * stride + lane;
    F a = S::template exp2<kDegree>((S::load(row) - reference) * scale);
    F b = S::template exp2<kDegree>((S::load(row + stride) - reference) * scale);
    if constexpr (kElemsPerWord == 2) {
      // Row key/2 was read before: the pairs fill the front half of the scores.
      S::store(scores + key / 2 * stride + lane, round_to_pair<N>(a, b));
    } else {
      S::store(scores + key * stride + lane, a);
      S::store(scores + (key + 1) * stride + lane, b);
    }
    sum = sum + a + b;
  }
  S::store(block.m + lane, m_new);
  S::store(block.l + lane, S::fma(S::load(block.l + lane), f, sum));
  S::store(rescale + lane, f);
}

}  // namespace
}  // namespace qwen1m
