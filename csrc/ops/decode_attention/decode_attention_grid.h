#pragma once
/// Blocks of a launch and the layout of its scratch: counters first, in a part of fixed size so
/// that calls of different shapes find them zero, then the partial results.

#include <cstdint>

#include "ops/decode_attention/decode_attention_splits.h"
#include "qwen1m/decode_attention.h"

namespace qwen1m {

inline constexpr int64_t kMaxCounters = 16 * 1024;
inline constexpr int64_t kCounterBytes = kMaxCounters * 4;

struct DecodeGrid {
  int32_t wanted_splits, max_splits;
  int32_t rows;        // of a block: 16 or 32
  int32_t row_blocks;  // of a KV head
  int64_t sequences;   // (sequence, KV head, row block)

  /// most_rows: 32, or 16 for kernels that have no more.
  DecodeGrid(const DecodeAttentionShape& shape, int num_sms, int most_rows = 32)
      : wanted_splits(qwen1m::wanted_splits(shape.kv_heads, num_sms)),
        max_splits(static_cast<int32_t>(qwen1m::max_splits(shape.dual_chunk, shape.q_tokens,
                                                           shape.max_tokens, wanted_splits))) {
    const int64_t all_rows = shape.q_tokens * (shape.q_heads / shape.kv_heads);
    rows = all_rows > 16 ? most_rows : 16;
    row_blocks = static_cast<int32_t>((all_rows + rows - 1) / rows);
    sequences = shape.batch * shape.kv_heads * row_blocks;
  }
};

}  // namespace qwen1m
