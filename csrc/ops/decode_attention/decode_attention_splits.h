#pragma once
/// How the GPU kernels cut the keys of a sequence into splits, one block each. Plain integer code;
/// tests/emu/decode_splits_test.cpp checks it.
///
/// A split lies between two borders of Dual Chunk Attention, so that each query has one position in
/// it. Its edges depend on the sequence's own length and on the machine, not on the batch: a row
/// has the same bits in any batch.

#include <cstdint>

#include "arch/arch.h"
#include "qwen1m/dual_chunk.h"

namespace qwen1m {

/// Blocks that share a multiprocessor, and all that is launched for one long sequence.
inline constexpr int32_t kDecodeBlocksPerSm = 2;
/// Splits of a sequence, at most; their weights wait in shared memory for the merge.
inline constexpr int32_t kMaxSplits = 1024;
/// A shorter split would spend more time on its queries and its partial result than on its keys.
inline constexpr int32_t kMinSplitKeys = 256;
/// Splits start on multiples of it where no border lies in between.
inline constexpr int32_t kSplitGranule = 64;

Q1M_HOST_DEVICE constexpr int32_t div_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

/// Splits of a long sequence: one wave of blocks.
inline int32_t wanted_splits(int64_t kv_heads, int32_t num_sms) {
  const int64_t splits = kDecodeBlocksPerSm * num_sms / kv_heads;
  return static_cast<int32_t>(splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits);
}

/// Splits that a sequence of up to max_tokens can have: what the grid provides for.
inline int64_t max_splits(const DualChunk& chunks, int64_t q_tokens, int64_t max_tokens,
                          int32_t wanted) {
  const int64_t len = chunks.chunk_len();
  // Borders lie at the chunks of the query tokens and at the one before them.
  int64_t ranges = max_tokens <= len ? 1 : 3 + (q_tokens - 1 + len - 1) / len;
  if (max_tokens > len && ranges > (max_tokens - 1) / len + 1) ranges = (max_tokens - 1) / len + 1;
  const int64_t by_length = max_tokens / kMinSplitKeys + 2 * ranges;
  const int64_t by_machine = ranges > wanted ? ranges : wanted;
  return by_length < by_machine ? by_length : by_machine;
}

/// Keys [begin, end).
struct KeyRange {
  int32_t begin, end;
};

/// The splits of one sequence of kv_len > 0 tokens, of which the last q_tokens are queries.
struct SequenceSplits {
  int32_t kv_len;
  int32_t first_border;  // border k, from 0 on, lies at first_border + k chunk_len
  int32_t chunk_len;
  int32_t num_ranges;  // between borders
  int32_t length;      // keys of a split, at most
  int32_t count;

  Q1M_HOST_DEVICE SequenceSplits(const DualChunk& chunks, int32_t tokens, int32_t q_tokens,
                                 int32_t wanted)
      : kv_len(tokens), first_border(0), chunk_len(0), num_ranges(1) {
    if (kv_len > chunks.chunk_len()) {
      chunk_len = static_cast<int32_t>(chunks.chunk_len());
      const int32_t first_chunk = (kv_len - q_tokens) / chunk_len;
      const int32_t last_chunk = (kv_len - 1) / chunk_len;
      const int32_t border_chunk = first_chunk > 2 ? first_chunk - 1 : 1;
      first_border = border_chunk * chunk_len;
      num_ranges = last_chunk - border_chunk + 2;
    }
    // As many splits as wanted if they can be had: each range rounds its number up.
    int32_t total = 0;
    for (int32_t i = 0; i < num_ranges; ++i) total += span(range(i));
    int32_t splits = wanted;
    do {
      length = div_up(div_up(total, splits), kSplitGranule) * kSplitGranule;
      if (length < kMinSplitKeys) length = kMinSplitKeys;
      count = 0;
      for (int32_t i = 0; i < num_ranges; ++i) count += div_up(span(range(i)), length);
    } while (count > wanted && --splits > 0);
  }

  /// Split `index`, 0 <= index < count.
  Q1M_HOST_DEVICE KeyRange at(int32_t index) const {
    for (int32_t i = 0;; ++i) {
      const KeyRange all = range(i);
      const int32_t here = div_up(span(all), length);
      if (index >= here && i + 1 < num_ranges) {
        index -= here;
        continue;
      }
      const int32_t begin = aligned(all.begin) + index * length, end = begin + length;
      return {begin > all.begin ? begin : all.begin, end < all.end ? end : all.end};
    }
  }

 private:
  Q1M_HOST_DEVICE static int32_t aligned(int32_t key) {
    return key / kSplitGranule * kSplitGranule;
  }
  Q1M_HOST_DEVICE static int32_t span(KeyRange r) { return r.end - aligned(r.begin); }
  Q1M_HOST_DEVICE KeyRange range(int32_t index) const {
    return {index == 0 ? 0 : first_border + (index - 1) * chunk_len,
            index + 1 == num_ranges ? kv_len : first_border + index * chunk_len};
  }
};

}  // namespace qwen1m
