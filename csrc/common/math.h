#pragma once
/// Float functions the compiler can vectorise (no calls, no branches).

#include <bit>
#include <cstdint>

#include "common/target.h"
#include "qwen1m/dtypes.h"

namespace qwen1m {

/// Elements as floats. (`out[i] = T(value)` would copy a struct, which gcc 12 does not vectorise.)
Q1M_INLINE float load(const float* p) { return *p; }
Q1M_INLINE float load(const bf16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }
Q1M_INLINE void store(float* p, float value) { *p = value; }
Q1M_INLINE void store(bf16* p, float value) { p->bits = bf16(value).bits; }

/// exp(x) for x <= 0: within 2 ulp down to -87.3, gradual underflow below, exp(-inf) = 0, NaN kept.
/// Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, and the minimax polynomial of Cephes' expf
/// (netlib.org/cephes, single/expf.c).
Q1M_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -110.0f ? -110.0f : x;         // exp(-110) is 0 in fp32; keeps n within 9 bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // n * 0.693359375 is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Times 2^n in two steps, because 2^n itself may be below the smallest normal number.
  const int32_t i =
      static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound));
  const int32_t half = i >> 1;
  const uint32_t rest = static_cast<uint32_t>(i) - static_cast<uint32_t>(half);
  return p * std::bit_cast<float>((static_cast<uint32_t>(half) + 127u) << 23) *
         std::bit_cast<float>((rest + 127u) << 23);
}

/// 1 / (1 + exp(-x)) without overflow.
Q1M_INLINE float sigmoid(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float e = exp_nonpositive(-magnitude);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace qwen1m
