// The cut of a sequence's keys into splits (decode_attention_splits.h): every key once, one Dual
// Chunk position per query in a split, no more splits than the grid has blocks.
#include <algorithm>

#include "arch/emu/emulator.h"
#include "ops/decode_attention/decode_attention_grid.h"
#include "test.h"

namespace qwen1m {
namespace {

/// Which of the three positions a token has for a key.
int64_t distance(const DualChunk& chunks, int64_t token, int64_t key) {
  return std::min<int64_t>(chunks.chunk(token) - chunks.chunk(key), 2);
}

void check(const DualChunk& chunks, int64_t kv_len, int64_t q_tokens, int32_t wanted) {
  const SequenceSplits splits(chunks, static_cast<int32_t>(kv_len), static_cast<int32_t>(q_tokens),
                              wanted);
  int64_t next = 0, longest = 0;
  for (int32_t i = 0; i < splits.count; ++i) {
    const KeyRange keys = splits.at(i);
    if (keys.begin != next || keys.end <= keys.begin) {
      EXPECT_EQ(keys.begin, next);
      EXPECT(keys.end > keys.begin);
      return;
    }
    for (int64_t token = kv_len - q_tokens; token < kv_len; ++token) {
      if (token < keys.begin) continue;
      const int64_t last = std::min<int64_t>(keys.end - 1, token);
      EXPECT_EQ(distance(chunks, token, keys.begin), distance(chunks, token, last));
    }
    longest = std::max<int64_t>(longest, keys.end - keys.begin);
    next = keys.end;
  }
  EXPECT_EQ(next, kv_len);
  for (const int64_t more : {int64_t{0}, int64_t{77}, kv_len}) {
    EXPECT(splits.count <= max_splits(chunks, q_tokens, kv_len + more, wanted));
  }
  // Even: no split is much longer than a wanted-th part of the keys.
  const int64_t ranges = chunks.chunk_len() < kv_len ? 4 + q_tokens / chunks.chunk_len() : 1;
  if (wanted > ranges) {
    EXPECT(longest <= std::max<int64_t>(kMinSplitKeys,
                                        (kv_len + ranges * kSplitGranule) / (wanted - ranges + 1) +
                                            kSplitGranule));
  }
}

Q1M_TEST(every_key_is_in_one_split_and_has_one_position) {
  for (const DualChunk chunks : {DualChunk{}, DualChunk{250, 42}, DualChunk{1152, 128},
                                 DualChunk{113, 13}, DualChunk{48, 8}, DualChunk{2, 1}}) {
    for (const int32_t wanted : {1, 2, 5, 33, 66, 1024}) {
      for (const int64_t q_tokens : {1, 2, 8}) {
        for (int64_t kv_len = q_tokens; kv_len < 5000; kv_len += kv_len < 600 ? 1 : 37) {
          check(chunks, kv_len, q_tokens, wanted);
        }
      }
    }
  }
}

Q1M_TEST(a_million_tokens_of_the_models) {
  const DualChunk chunks{262144, 8192};
  for (const int64_t kv_len : {1010000, 1048576}) {
    for (const int32_t wanted : {33, 66}) {
      const SequenceSplits splits(chunks, static_cast<int32_t>(kv_len), 1, wanted);
      EXPECT(splits.count <= wanted);
      EXPECT(splits.length <= kv_len / wanted * 11 / 10);
    }
  }
}

Q1M_TEST(wanted_splits_fill_the_machine) {
  EXPECT_EQ(wanted_splits(4, 132), 66);
  EXPECT_EQ(wanted_splits(8, 132), 33);
  EXPECT_EQ(wanted_splits(128, 6), 1);
  EXPECT_EQ(wanted_splits(1, 10000), kMaxSplits);
}

}  // namespace
}  // namespace qwen1m
