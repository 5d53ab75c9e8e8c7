#include "qwen1m/rms_norm.h"

#include <cmath>

#include "inputs.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::random_values;
using test::view;

/// fp32: half an ulp of the output's rounding and a few of the sums; bf16: half an ulp, and the few
/// values whose fp32 result lies at a rounding border.
template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 4e-7 : 4.0e-3;

template <typename T>
void check_against_double(int64_t tokens, int64_t hidden, int64_t gap, bool has_residual) {
  const int64_t stride = hidden + gap;
  auto x = random_values<T>(tokens * stride, 1), residual = random_values<T>(tokens * stride, 2);
  auto weight = random_values<T>(hidden, 3);
  std::vector<T> out(x.size(), T(7.0f));
  const auto before = residual;
  RmsNormParams p{.out = view(out, {tokens, hidden}, stride),
                  .residual = {},
                  .x = view(x, {tokens, hidden}, stride),
                  .weight = view(weight, {hidden}),
                  .eps = 1e-6f};
  if (has_residual) p.residual = view(residual, {tokens, hidden}, stride);
  rms_norm_cpu(p, test::threads(2));

  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    std::vector<double> row(static_cast<size_t>(hidden));
    for (int64_t i = 0; i < hidden; ++i) {
      const auto at = static_cast<size_t>(t * stride + i);
      T value = x[at];
      if (has_residual) {
        value = T(static_cast<float>(before[at]) + static_cast<float>(x[at]));
        EXPECT(static_cast<float>(residual[at]) == static_cast<float>(value));
      }
      row[static_cast<size_t>(i)] = static_cast<double>(static_cast<float>(value));
      sum += row[static_cast<size_t>(i)] * row[static_cast<size_t>(i)];
    }
    const double scale = 1 / std::sqrt(sum / static_cast<double>(hidden) + 1e-6);
    for (int64_t i = 0; i < stride; ++i) {
      const float got = static_cast<float>(out[static_cast<size_t>(t * stride + i)]);
      if (i >= hidden) {
        EXPECT_EQ(got, 7.0f);  // the gap between rows is not touched
        continue;
      }
      const double expected =
          row[static_cast<size_t>(i)] * scale *
          static_cast<double>(static_cast<float>(weight[static_cast<size_t>(i)]));
      EXPECT(std::abs(got - expected) <= kTolerance<T> * std::abs(expected));
    }
  }
}

Q1M_TEST(matches_double) {
  for (const int64_t hidden : {1, 31, 32, 33, 100, 896}) {
    for (const int64_t tokens : {1, 5}) {
      for (const bool residual : {false, true}) {
        check_against_double<float>(tokens, hidden, hidden % 3, residual);
        check_against_double<bf16>(tokens, hidden, hidden % 3, residual);
      }
    }
  }
}

template <typename T>
void check_row_alone(int64_t tokens, int64_t hidden) {
  auto x = random_values<T>(tokens * hidden, 4), weight = random_values<T>(hidden, 5);
  std::vector<T> together(x.size()), alone(x.size());
  rms_norm_cpu({.out = view(together, {tokens, hidden}),
                .residual = {},
                .x = view(x, {tokens, hidden}),
                .weight = view(weight, {hidden})},
               test::threads(3));
  for (int64_t t = 0; t < tokens; ++t) {
    auto in = view(x, {1, hidden}), out = view(alone, {1, hidden});
    in.data = static_cast<T*>(in.data) + t * hidden;
    out.data = static_cast<T*>(out.data) + t * hidden;
    rms_norm_cpu({.out = out, .residual = {}, .x = in, .weight = view(weight, {hidden})}, {});
  }
  EXPECT(test::same_bits(together, alone));
}

Q1M_TEST(a_row_does_not_depend_on_the_others_or_on_threads) {
  check_row_alone<float>(40, 3584);
  check_row_alone<bf16>(40, 3584);
}

Q1M_TEST(in_place_is_the_same) {
  auto x = random_values<float>(3 * 100, 6), weight = random_values<float>(100, 7);
  std::vector<float> out(x.size());
  rms_norm_cpu({.out = view(out, {3, 100}),
                .residual = {},
                .x = view(x, {3, 100}),
                .weight = view(weight, {100})},
               {});
  rms_norm_cpu({.out = view(x, {3, 100}),
                .residual = {},
                .x = view(x, {3, 100}),
                .weight = view(weight, {100})},
               {});
  EXPECT(test::same_bits(out, x));
}

Q1M_TEST(the_bits_do_not_depend_on_the_instruction_set) {
  auto x = random_values<float>(2 * 133, 8), weight = random_values<float>(133, 9);
  std::vector<float> out(x.size());
  rms_norm_cpu({.out = view(out, {2, 133}),
                .residual = {},
                .x = view(x, {2, 133}),
                .weight = view(weight, {133})},
               {});
  EXPECT_EQ(test::fingerprint(out), 1713502899344575588u);
}

Q1M_TEST(no_tokens_is_fine) {
  std::vector<float> none, weight(64);
  rms_norm_cpu({.out = view(none, {0, 64}),
                .residual = view(none, {0, 64}),
                .x = view(none, {0, 64}),
                .weight = view(weight, {64})},
               {});
}

Q1M_TEST(errors_name_the_argument) {
  std::vector<float> a(64), weight(8);
  std::vector<bf16> other(64);
  RmsNormParams good{
      .out = view(a, {4, 8}), .residual = {}, .x = view(a, {4, 8}), .weight = view(weight, {8})};
  auto p = good;
  p.out = view(a, {4, 7});
  EXPECT_ERROR("rms_norm: out: expected shape [tokens=4, hidden=8], got [4, 7]",
               rms_norm_cpu(p, {}));
  p = good;
  p.residual = view(other, {4, 8});
  EXPECT_ERROR("rms_norm: residual: expected dtype float32 (as x), got bfloat16",
               rms_norm_cpu(p, {}));
  p = good;
  p.x.strides = {1, 4};
  EXPECT_ERROR(
      "rms_norm: x: expected a contiguous last dimension, got shape [4, 8] with strides [1, 4]",
      rms_norm_cpu(p, {}));
  p = good;
  p.eps = 0;
  EXPECT_ERROR("rms_norm: eps: expected a number > 0, got 0.000000", rms_norm_cpu(p, {}));
}

}  // namespace
}  // namespace qwen1m
