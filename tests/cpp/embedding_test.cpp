#include "qwen1m/embedding.h"

#include "inputs.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::random_values;
using test::view;

Q1M_TEST(rows_are_copied_bit_for_bit) {
  constexpr int64_t kVocab = 7, kWidth = 13, kStride = 17;
  auto weight = random_values<bf16>(kVocab * kStride, 1);
  std::vector<int64_t> ids = {6, 0, 6, 3};
  std::vector<bf16> out(4 * kWidth), expected;
  for (const int64_t id : ids) {
    for (int64_t i = 0; i < kWidth; ++i) {
      expected.push_back(weight[static_cast<size_t>(id * kStride + i)]);
    }
  }
  embedding_cpu({.out = view(out, {4, kWidth}),
                 .weight = view(weight, {kVocab, kWidth}, kStride),
                 .token_ids = {ids.data(), {4}, {1}}},
                test::threads(2));
  EXPECT(test::same_bits(out, expected));
}

Q1M_TEST(errors_name_the_argument_and_nothing_is_written) {
  std::vector<float> weight(8, 1.0f), out(8, 7.0f);
  std::vector<int64_t> ids = {0, 4};
  EXPECT_ERROR("embedding: token_ids[1]: expected an id in [0, vocab=4), got 4",
               embedding_cpu({.out = view(out, {2, 2}),
                              .weight = view(weight, {4, 2}),
                              .token_ids = {ids.data(), {2}, {1}}},
                             {}));
  EXPECT(out[0] == 7.0f);
}

}  // namespace
}  // namespace qwen1m
