// bf16: rounding to nearest even, against the definition.
#include "qwen1m/dtypes.h"

#include <cmath>
#include <limits>

#include "test.h"

namespace qwen1m {
namespace {

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

Q1M_TEST(every_bf16_survives_the_round_trip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = from_bits(bits << 16);
    const bf16 rounded(value);
    if (std::isnan(value)) {
      EXPECT(std::isnan(static_cast<float>(rounded)));
    } else {
      EXPECT_EQ(rounded.bits, bits);
    }
  }
}

Q1M_TEST(rounds_to_nearest_and_ties_to_even) {
  for (uint32_t upper = 0; upper < 0x7f80; ++upper) {  // every finite positive bf16
    for (const uint32_t sign : {0u, 0x8000u}) {
      const uint32_t low = (upper | sign) << 16;
      const uint32_t even = upper % 2 == 0 ? upper : upper + 1;  // 0x7f80 is infinity
      EXPECT_EQ(bf16(from_bits(low | 0x7fffu)).bits, upper | sign);
      EXPECT_EQ(bf16(from_bits(low | 0x8000u)).bits, even | sign);
      EXPECT_EQ(bf16(from_bits(low | 0x8001u)).bits, (upper + 1) | sign);
    }
  }
}

Q1M_TEST(nan_stays_nan_and_overflow_becomes_infinity) {
  // The mantissa of these NaNs lies in the lower half, or rounding up would carry into the sign.
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    const bf16 rounded(from_bits(bits));
    EXPECT(std::isnan(static_cast<float>(rounded)));
    EXPECT_EQ(rounded.bits >> 15, bits >> 31);
  }
  EXPECT_EQ(bf16(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(bf16(-std::numeric_limits<float>::infinity()).bits, 0xff80);
}

// --- e4m3 -------------------------------------------------------------------------------------

/// The definition: sign, exponent of 4 bits with bias 7, mantissa of 3 bits.
double value_of(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, -9)
                               : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

Q1M_TEST(every_e4m3_survives_the_round_trip) {
  for (uint32_t code = 0; code < 0x100; ++code) {
    e4m3 x;
    x.bits = static_cast<uint8_t>(code);
    const float value = static_cast<float>(x);
    if ((code & 0x7f) == 0x7f) {
      EXPECT(std::isnan(value));
    } else {
      EXPECT_EQ(value, value_of(code));
      EXPECT_EQ(bf16(value).bits, std::bit_cast<uint32_t>(value) >> 16);
    }
    EXPECT_EQ(e4m3(value).bits, code);
  }
}

Q1M_TEST(e4m3_rounds_to_nearest_and_ties_to_even) {
  for (uint32_t code = 0; code + 1 < 0x7f; ++code) {
    const float middle = static_cast<float>((value_of(code) + value_of(code + 1)) / 2);
    for (const uint32_t sign : {0u, 0x80u}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      EXPECT_EQ(e4m3(s * middle).bits, (code % 2 == 0 ? code : code + 1) | sign);
      EXPECT_EQ(e4m3(s * std::nextafter(middle, 0.0f)).bits, code | sign);
      EXPECT_EQ(e4m3(s * std::nextafter(middle, 1e9f)).bits, (code + 1) | sign);
    }
  }
}

Q1M_TEST(e4m3_saturates_and_keeps_nan) {
  for (const float large : {448.0f, 464.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(e4m3(large).bits, 0x7e);
    EXPECT_EQ(e4m3(-large).bits, 0xfe);
  }
  EXPECT_EQ(e4m3(std::numeric_limits<float>::quiet_NaN()).bits & 0x7f, 0x7f);
  EXPECT_EQ(e4m3(std::numeric_limits<float>::denorm_min()).bits, 0);
}

}  // namespace
}  // namespace qwen1m
