#pragma once
/// What is drawn, the same source for every backend: Philox, integer weights, and the search for
/// the token. Every operation on floats below has one IEEE rounding, spelled so that no compiler
/// can fuse it with its neighbour; integers are exact. So all backends choose the same token.

#include <bit>
#include <cmath>
#include <cstdint>

#include "arch/arch.h"
#include "qwen1m/dtypes.h"

namespace qwen1m {

/// Weight of the likeliest token; that of a whole row stays below 2^63.
inline constexpr int kWeightBits = 44;
inline constexpr int64_t kMaxSampleVocab = int64_t{1} << (63 - kWeightBits);

/// Token id belongs to lane id / 8 % kSampleLanes: the lanes are the threads of a block. Cumulative
/// weights run lane by lane, and by ascending id within a lane.
inline constexpr int kSampleLanes = 512;
inline constexpr int kLaneRun = 8;

/// One row's numbers.
struct SampleSettings {
  float exponent = 0;    // log2(e) / temperature; 0: greedy
  float repetition = 1;  // penalties
  float presence = 0;
  float frequency = 0;
  float top_p = 1;
  uint64_t min_weight = 0;  // tokens below it are out
  int64_t top_k = 0;        // 1 to vocab
  uint64_t seed = 0;
  uint64_t position = 0;
};

Q1M_DEVICE SampleSettings make_settings(float temperature, int64_t top_k, float top_p, float min_p,
                                        int64_t seed, int64_t position, int64_t vocab) {
  SampleSettings s;
  // With a smaller temperature nothing but ties with the likeliest token has a weight.
  s.exponent = temperature > 0 ? fminf(1.44269504f / temperature, 1e30f) : 0.0f;
  s.top_k = top_k <= 0 || top_k > vocab ? vocab : top_k;
  s.top_p = top_p;
  constexpr auto kOne = static_cast<float>(uint64_t{1} << kWeightBits);
  s.min_weight = min_p > 0 ? static_cast<uint64_t>(fminf(min_p, 1.0f) * kOne) : 0;
  s.seed = static_cast<uint64_t>(seed);
  s.position = static_cast<uint64_t>(position);
  return s;
}

/// a * b, rounded: an addition behind it is not fused into it.
Q1M_DEVICE float product(float a, float b) { return fmaf(a, b, 0.0f); }

/// A logit with its penalties; -0 becomes 0, with which it is equal.
Q1M_DEVICE float adjust(const SampleSettings& s, float logit, int32_t history) {
  float a = logit;
  if (history > 0) {
    if (s.repetition != 1.0f) a = a > 0 ? a / s.repetition : product(a, s.repetition);
    if (history > 1) a -= fmaf(s.frequency, static_cast<float>(history / 2), s.presence);
  }
  return a + 0.0f;
}

/// Tokens in descending order of `a`, lower ids first among equals, as one number; never 0, nor the
/// largest number.
Q1M_DEVICE uint64_t order_of(float a, int64_t id) {
  const auto bits = std::bit_cast<uint32_t>(a);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{ascending} << 32 | (0xfffffffeu - static_cast<uint32_t>(id));
}
Q1M_DEVICE int64_t id_of(uint64_t order) { return 0xfffffffeu - static_cast<uint32_t>(order); }
Q1M_DEVICE float value_of(uint64_t order) {
  const auto ascending = static_cast<uint32_t>(order >> 32);
  return std::bit_cast<float>((ascending & 0x80000000u) != 0 ? ascending & 0x7fffffffu
                                                             : ~ascending);
}

/// 2^44 exp((a - largest) / temperature) as an integer; 0 if min_p excludes it. Cody-Waite: the
/// power is n + r, |r| <= 1/2, and 2^r its Taylor polynomial (1.2e-7).
Q1M_DEVICE uint64_t weight_of(const SampleSettings& s, float a, float largest) {
  const float distance = a - largest;
  if (!(product(distance, s.exponent) > -64.0f)) return 0;  // also of a = -inf
  constexpr float kRound = 12582912.0f;                     // 1.5 * 2^23: adding it rounds
  const float shifted = fmaf(distance, s.exponent, kRound);
  const float n = shifted - kRound;
  const float r = fmaf(distance, s.exponent, -n);
  float p = 1.540353039e-4f;  // ln2^k / k!
  p = fmaf(p, r, 1.333355815e-3f);
  p = fmaf(p, r, 9.618129108e-3f);
  p = fmaf(p, r, 5.550410866e-2f);
  p = fmaf(p, r, 2.402265070e-1f);
  p = fmaf(p, r, 6.931471806e-1f);
  p = fmaf(p, r, 1.0f);
  const uint64_t mantissa = static_cast<uint32_t>(product(p, 8388608.0f));  // 2^23
  const int shift = static_cast<int>(n) + (kWeightBits - 23);
  const uint64_t weight = shift >= 0 ? mantissa << shift : mantissa >> -shift;  // -shift <= 43
  return weight >= s.min_weight ? weight : 0;
}

/// The upper 64 bits of a product: `random` scaled to [0, range).
Q1M_DEVICE uint64_t scaled(uint64_t random, uint64_t range) {
  const uint64_t a0 = random & 0xffffffff, a1 = random >> 32;
  const uint64_t b0 = range & 0xffffffff, b1 = range >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & 0xffffffff)) >> 32);
}

/// Philox4x32-10, the first two words for the counter (position, number, 0).
Q1M_DEVICE uint64_t philox(uint64_t seed, uint64_t position, uint32_t number) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), number,
                   0};
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  Q1M_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t{c[1]} << 32 | c[0];
}

/// All tokens above a place in the order: how many, their weight, and each lane's share of it.
template <typename LaneWeights>
struct TokensAbove {
  uint64_t order;
  uint64_t weight;
  int64_t count;
  LaneWeights lanes;
};

/// Draws a token by rejection: from a set that holds all that may be drawn, the token being
/// accepted if it may. What is learnt about a rejected token shrinks the set, so a few rounds do
/// (one or two where the set has most of the probability, 2 log2(vocab / k) for a flat
/// distribution). No sorting.
///
/// Row has LaneWeights, which can be added and subtracted, and
///   TokensAbove<LaneWeights> above(order)  one pass over the row
///   uint64_t pick(lanes, x, lower, upper)  order of the token at which the cumulative weight of
///   the
///                                          tokens between the two exceeds x; `lanes` are their
///                                          weights
///   uint64_t weight(order)                 of a token
///   LaneWeights only(order)                that weight, in the lane of the token
template <typename Row>
Q1M_DEVICE uint64_t draw(Row& row, const SampleSettings& s, int64_t vocab) {
  using Above = TokensAbove<typename Row::LaneWeights>;
  const bool all = s.top_k >= vocab && s.top_p >= 1.0f;
  Above support = row.above(0);
  // The top k lie above `outside` and hold `inside`, which is a token and those above it.
  Above outside = support;
  outside.count = vocab;
  Above inside = {~uint64_t{0}, 0, 0, {}};
  uint64_t token = 0;  // that is decided about
  Above above = {};    // it
  bool deciding = false;
  for (uint32_t number = 0;; ++number) {  // of the random number
    // A token to decide about; or one of the uncertain part, to learn where the top k end.
    const uint64_t range = deciding ? outside.weight - inside.weight : support.weight;
    const uint64_t drawn =
        row.pick(deciding ? outside.lanes - inside.lanes : support.lanes,
                 scaled(philox(s.seed, s.position, number), range),
                 deciding ? outside.order : support.order, deciding ? inside.order : ~uint64_t{0});
    if (all) return drawn;
    const Above here = row.above(drawn);
    if (here.count >= s.top_k) {
      if (drawn > outside.order) outside = here;
    } else if (drawn < inside.order) {
      inside = {drawn, here.weight + row.weight(drawn), here.count + 1,
                here.lanes + row.only(drawn)};
    }
    if (!deciding) {
      token = drawn;
      above = here;
    }
    bool accepted = above.count < s.top_k;
    deciding = false;
    if (accepted && s.top_p < 1.0f && above.weight > 0) {
      // Accepted if what lies above is less than top_p of the top k's weight. Mostly it is enough
      // to know that weight roughly.
      const bool exact = outside.count <= s.top_k || outside.weight == inside.weight;
      const auto reached = static_cast<double>(above.weight);
      const auto least = static_cast<double>(exact ? outside.weight : inside.weight);
      if (!(reached < static_cast<double>(s.top_p) * least)) {
        accepted = reached < static_cast<double>(s.top_p) * static_cast<double>(outside.weight);
        deciding = accepted && !exact;
      }
    }
    if (deciding) continue;
    if (accepted) return token;
    support = above;
    if (outside.order > support.order) support = outside;
  }
}

}  // namespace qwen1m
