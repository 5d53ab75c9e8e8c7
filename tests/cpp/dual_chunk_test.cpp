// The position rules of dual_chunk.h against their definition, one (query, key) pair at a time.
#include "qwen1m/dual_chunk.h"

#include "test.h"

namespace qwen1m {
namespace {

/// Position of the query of token i minus that of the key of token j, from the chunk numbers alone
/// (arXiv:2402.17463, equations 2 to 6, with the critical cap at chunk_size).
int64_t relative_position(int64_t chunk_size, int64_t local_size, int64_t i, int64_t j) {
  const int64_t length = chunk_size - local_size;
  const int64_t distance_in_chunks = i / length - j / length;
  const int64_t key = j % length;
  if (distance_in_chunks == 0) return i - j;
  if (distance_in_chunks == 1) return std::min(i % length + length, chunk_size) - key;
  return std::min(2 * length - 1, chunk_size) - key;
}

Q1M_TEST(every_pair_follows_the_definition) {
  for (const int64_t chunk_size : {1, 2, 3, 8, 13, 16}) {
    for (int64_t local_size = 0; local_size < chunk_size; ++local_size) {
      const DualChunk rule{.chunk_size = chunk_size, .local_size = local_size};
      const int64_t tokens = 5 * rule.chunk_len() + 3;
      for (int64_t i = 0; i < tokens; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const int64_t query = j >= rule.intra_begin(i)        ? rule.intra_position(i)
                                : j >= rule.successive_begin(i) ? rule.successive_position(i)
                                                                : rule.inter_position();
          EXPECT_EQ(query - rule.key_position(j), relative_position(chunk_size, local_size, i, j));
          EXPECT(query < rule.table_rows(i + 1));
          EXPECT(rule.key_position(j) < rule.table_rows(i + 1));
        }
      }
    }
  }
}

Q1M_TEST(neighbours_keep_their_distance_across_a_border) {
  // The purpose of local_size: up to it, a key of the chunk before is at its true distance.
  const DualChunk rule{.chunk_size = 16, .local_size = 5};
  for (int64_t i = rule.chunk_len(); i < 5 * rule.chunk_len(); ++i) {
    for (int64_t j = i - rule.local_size; j < rule.intra_begin(i); ++j) {
      EXPECT_EQ(rule.successive_position(i) - rule.key_position(j), i - j);
    }
  }
}

Q1M_TEST(an_infinite_chunk_is_plain_rope) {
  const DualChunk rule;
  EXPECT_EQ(rule.inter_position(), kInfiniteChunk);  // nobody uses it, but it must not overflow
  for (const int64_t token : {int64_t{0}, int64_t{1}, int64_t{1'010'000}, int64_t{1} << 40}) {
    EXPECT_EQ(rule.key_position(token), token);
    EXPECT_EQ(rule.intra_position(token), token);
    EXPECT_EQ(rule.intra_begin(token), 0);
    EXPECT_EQ(rule.successive_begin(token), 0);
    EXPECT_EQ(rule.table_rows(token), token);
  }
}

Q1M_TEST(the_published_configuration) {
  const DualChunk rule{.chunk_size = 262'144, .local_size = 8'192};
  EXPECT_EQ(rule.chunk_len(), 253'952);
  EXPECT_EQ(rule.chunk_len() % kPageSize, 0);
  EXPECT_EQ(rule.inter_position(), 262'144);
  EXPECT_EQ(rule.table_rows(1'010'000), 262'145);
  EXPECT_EQ(rule.chunk(1'009'999), 3);
}

}  // namespace
}  // namespace qwen1m
