#include "qwen1m/swiglu.h"

#include <cmath>
#include <limits>

#include "inputs.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::random_values;
using test::view;

template <typename T>
void check_against_double(int64_t tokens, int64_t n, int64_t gap) {
  const int64_t stride = 2 * n + gap;
  auto gate_up = random_values<T>(tokens * stride, 1, 20.0f);
  std::vector<T> out(static_cast<size_t>(tokens * n));
  swiglu_cpu({.out = view(out, {tokens, n}), .gate_up = view(gate_up, {tokens, 2 * n}, stride)},
             test::threads(2));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(t * stride + i);
      const double gate = static_cast<float>(gate_up[at]);
      const double up = static_cast<float>(gate_up[at + static_cast<size_t>(n)]);
      const double expected = gate / (1 + std::exp(-gate)) * up;
      const double got = static_cast<float>(out[static_cast<size_t>(t * n + i)]);
      EXPECT(std::abs(got - expected) <= (sizeof(T) == 4 ? 5e-7 : 4.0e-3) * std::abs(expected));
    }
  }
}

Q1M_TEST(matches_double) {
  for (const int64_t n : {1, 15, 16, 17, 100, 1000}) {
    for (const int64_t tokens : {1, 7}) {
      check_against_double<float>(tokens, n, n % 3);
      check_against_double<bf16>(tokens, n, n % 3);
    }
  }
}

Q1M_TEST(special_values) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> gate_up = {0.0f, -200.0f, 200.0f, inf,  NAN,  1.0f,
                                2.0f, 2.0f,    2.0f,   2.0f, 2.0f, inf};
  std::vector<float> out(6);
  swiglu_cpu({.out = view(out, {1, 6}), .gate_up = view(gate_up, {1, 12})}, {});
  EXPECT(out[0] == 0 && out[1] == 0 && out[2] == 400 && out[3] == inf && std::isnan(out[4]) &&
         out[5] == inf);
}

Q1M_TEST(a_row_does_not_depend_on_the_others_or_on_threads) {
  constexpr int64_t kTokens = 9, kWidth = 9472;
  auto gate_up = random_values<bf16>(kTokens * 2 * kWidth, 2, 8.0f);
  std::vector<bf16> together(kTokens * kWidth), alone(kTokens * kWidth);
  swiglu_cpu(
      {.out = view(together, {kTokens, kWidth}), .gate_up = view(gate_up, {kTokens, 2 * kWidth})},
      test::threads(3));
  for (int64_t t = 0; t < kTokens; ++t) {
    auto in = view(gate_up, {1, 2 * kWidth}), out = view(alone, {1, kWidth});
    in.data = static_cast<bf16*>(in.data) + t * 2 * kWidth;
    out.data = static_cast<bf16*>(out.data) + t * kWidth;
    swiglu_cpu({.out = out, .gate_up = in}, {});
  }
  EXPECT(test::same_bits(together, alone));
}

Q1M_TEST(the_bits_do_not_depend_on_the_instruction_set) {
  auto gate_up = random_values<float>(2 * 2 * 133, 3, 30.0f);
  std::vector<float> out(2 * 133);
  swiglu_cpu({.out = view(out, {2, 133}), .gate_up = view(gate_up, {2, 266})}, {});
  EXPECT_EQ(test::fingerprint(out), 5934476985013714586u);
}

Q1M_TEST(no_tokens_is_fine) {
  std::vector<float> none;
  swiglu_cpu({.out = view(none, {0, 64}), .gate_up = view(none, {0, 128})}, {});
}

Q1M_TEST(errors_name_the_argument) {
  std::vector<float> a(64);
  std::vector<bf16> other(64);
  EXPECT_ERROR("swiglu: gate_up: expected shape [tokens=2, 2 intermediate=8], got [2, 9]",
               swiglu_cpu({.out = view(a, {2, 4}), .gate_up = view(a, {2, 9})}, {}));
  EXPECT_ERROR("swiglu: gate_up: expected dtype float32 (as out), got bfloat16",
               swiglu_cpu({.out = view(a, {2, 4}), .gate_up = view(other, {2, 8})}, {}));
}

}  // namespace
}  // namespace qwen1m
