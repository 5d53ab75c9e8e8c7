#include "qwen1m/sample.h"

#include <cmath>

#include "inputs.h"
#include "ops/sample/sample_rule.h"
#include "test.h"

namespace qwen1m {
namespace {

Q1M_TEST(philox_is_that_of_the_paper) {
  // Known answers of Random123 (kat_vectors, philox4x32 10), first two words.
  EXPECT_EQ(philox(0, 0, 0), 0xe169c58d6627e8d5u);
  EXPECT(philox(1, 0, 0) != philox(0, 1, 0) && philox(0, 0, 1) != philox(0, 0, 0));
}

Q1M_TEST(scaled_is_the_upper_half_of_the_product) {
  for (uint64_t i = 0; i < 200; ++i) {
    const uint64_t a = philox(1, i, 0), b = philox(2, i, 0) >> (i % 60);
    EXPECT_EQ(scaled(a, b), static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64));
  }
}

Q1M_TEST(weights_are_exponentials) {
  for (const float temperature : {0.05f, 0.7f, 1.0f, 30.0f}) {
    const SampleSettings s = make_settings(temperature, 0, 1, 0, 0, 0, 100);
    EXPECT_EQ(weight_of(s, 3.5f, 3.5f), uint64_t{1} << kWeightBits);
    for (int i = 0; i <= 4000; ++i) {
      const float a = 3.5f - static_cast<float>(i) * 0.0125f * temperature;
      const double expected = std::ldexp(
          std::exp((static_cast<double>(a) - 3.5) / static_cast<double>(temperature)), kWeightBits);
      const auto got = static_cast<double>(weight_of(s, a, 3.5f));
      EXPECT(std::abs(got - expected) <= 4e-6 * expected + 1);
    }
  }
  const SampleSettings s = make_settings(1e-30f, 0, 1, 0, 0, 0, 100);
  EXPECT(weight_of(s, 1.0f, 1.0f) != 0 && weight_of(s, 0.9999f, 1.0f) == 0);
  EXPECT_EQ(weight_of(s, -INFINITY, 1.0f), 0u);
}

Q1M_TEST(min_p_cuts_weights) {
  const SampleSettings s = make_settings(1, 0, 1, 0.25f, 0, 0, 100);
  EXPECT(weight_of(s, std::log(0.251f), 0.0f) != 0);
  EXPECT_EQ(weight_of(s, std::log(0.249f), 0.0f), 0u);
}

Q1M_TEST(the_order_is_descending_with_lower_ids_first) {
  const float values[] = {INFINITY, 3e38f, 1.0f, 1e-40f, 0.0f, -1e-40f, -1.0f, -INFINITY};
  for (int i = 0; i < 7; ++i) EXPECT(order_of(values[i], 5) > order_of(values[i + 1], 0));
  EXPECT(order_of(1.0f, 2) > order_of(1.0f, 3));
  for (const float value : values) {
    EXPECT_EQ(value_of(order_of(value, 77)), value);
    EXPECT_EQ(id_of(order_of(value, 77)), 77);
  }
  const SampleSettings s;
  EXPECT_EQ(order_of(adjust(s, -0.0f, 0), 1), order_of(0.0f, 1));
}

}  // namespace
}  // namespace qwen1m
