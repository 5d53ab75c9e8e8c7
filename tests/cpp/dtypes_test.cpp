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

}  // namespace
}  // namespace qwen1m
