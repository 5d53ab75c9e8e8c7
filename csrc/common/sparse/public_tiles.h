#pragma once
/// What public implementations load for a tile of 64 rows: the index kernel of MInference
/// (arXiv:2407.02490, algorithm 4) in the variant for Dual Chunk Attention (vLLM 0.10.2,
/// vertical_slash_index.cu), quirks included. For tests and for the exact mode of sparse_prefill.
///
/// Everything is local to one stage: rows count from the segment's first, keys from the stage's
/// first. Row r meets key `shift` + r - s on the diagonal s; `shift` is kv_len, or for the intra
/// stage, which is causal, kv_len - q_len.

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "qwen1m/dual_chunk.h"

namespace qwen1m {

inline constexpr int64_t kPublicTile = 64;

/// Keys [begin, end).
struct KeyRange {
  int64_t begin = 0, end = 0;
};

struct PublicTile {
  std::vector<KeyRange> ranges;  // ascending, disjoint; blocks of 64 keys from each begin
  int64_t column_end = 0;        // columns at or after it are not loaded
};

/// The tile of rows [first_row, first_row + 64). `diagonals` ascending.
inline PublicTile public_tile(std::span<const int64_t> diagonals, int64_t first_row, int64_t kv_len,
                              int64_t shift, bool causal) {
  PublicTile tile;
  const int64_t last = first_row + kPublicTile + shift;
  const auto add = [&](int64_t s) {
    const int64_t end = std::max(last - s, kPublicTile);
    if (tile.ranges.empty() || end > tile.ranges.back().end + kPublicTile) {
      tile.ranges.push_back({end - kPublicTile, end});
    } else if (end > tile.ranges.back().end) {
      tile.ranges.back().end += kPublicTile;  // may overshoot `end`
    }
  };
  for (size_t i = diagonals.size(); i-- > 0;) {
    if (diagonals[i] >= last) continue;
    // Past the last key; only the first diagonal in reach is taken all the same.
    if (!causal && diagonals[i] < first_row && !tile.ranges.empty()) break;
    add(diagonals[i]);
  }
  // All diagonals left of key 0, the smallest just so: it still yields the first block.
  if (tile.ranges.empty() && !diagonals.empty() && diagonals.front() == last) add(last);
  tile.column_end = causal && !tile.ranges.empty() ? tile.ranges.back().end : kv_len;
  if (causal && tile.ranges.empty()) tile.column_end = 0;
  for (KeyRange& range : tile.ranges) range.end = std::min(range.end, kv_len);
  return tile;
}

}  // namespace qwen1m
