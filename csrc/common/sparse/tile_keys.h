#pragma once
/// From a head's lists (sparse_plan.h) to the keys that one tile of rows attends to
/// (sparse_prefill.h).

#include <array>
#include <span>
#include <vector>

#include "common/sparse/public_tiles.h"
#include "qwen1m/sparse_plan.h"

namespace qwen1m {

/// Offsets [lo, hi).
struct OffsetRun {
  int32_t lo, hi;
};

/// Keys [b, e) of each stage for the tokens of a chunk that holds `token`; the segment ends at
/// segment_end.
inline std::array<KeyRange, kStages> stage_keys(const DualChunk& chunks, int64_t token,
                                                int64_t segment_end) {
  const int64_t intra = chunks.intra_begin(token), successive = chunks.successive_begin(token);
  return {{{0, successive}, {successive, intra}, {intra, segment_end}}};
}

/// One head and one stage of a plan.
struct StageLists {
  KeyRange keys;  // of the stage
  std::span<const OffsetRun> runs;
  std::span<const int32_t> verticals;
};

struct Segment {
  int64_t begin = 0, end = 0, tile_tokens = 0;
  bool exact = false;
};

/// Calls f(begin, end) with the keys that the tile of rows t0 .. attends to in a stage, causality
/// apart: ascending, disjoint, neighbours joined.
template <typename F>
void for_each_key_range(const Segment& segment, const StageLists& lists, int64_t t0, F&& f) {
  KeyRange pending;
  const auto emit = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (begin == pending.end && pending.begin < pending.end) {
      pending.end = end;
      return;
    }
    if (pending.begin < pending.end) f(pending.begin, pending.end);
    pending = {begin, end};
  };
  const auto [b, e] = lists.keys;
  size_t vertical = 0;
  int64_t vertical_end = e;
  /// The verticals below the next range, then the range, of which they are skipped.
  const auto take = [&](KeyRange range) {
    for (; vertical < lists.verticals.size() && lists.verticals[vertical] < range.end; ++vertical) {
      const int64_t key = lists.verticals[vertical];
      if (key < range.begin && key < vertical_end) emit(key, key + 1);
    }
    emit(range.begin, range.end);
  };

  if (segment.exact) {
    const bool causal = e == segment.end;
    const int64_t kv_len = e - b;
    const int64_t shift = causal ? kv_len - (segment.end - segment.begin) : kv_len;
    const int64_t to_local = causal ? 0 : segment.begin - e;
    std::vector<int64_t> diagonals;
    for (const OffsetRun& run : lists.runs) {
      for (int64_t o = run.lo; o < run.hi; ++o) diagonals.push_back(o - to_local);
    }
    const PublicTile tile = public_tile(diagonals, t0 - segment.begin, kv_len, shift, causal);
    vertical_end = b + tile.column_end;
    for (const KeyRange& range : tile.ranges) take({b + range.begin, b + range.end});
  } else {
    const int64_t t1 = std::min(t0 + segment.tile_tokens, segment.end);
    for (size_t i = lists.runs.size(); i-- > 0;) {
      const OffsetRun run = lists.runs[i];
      take({std::max(b, t0 - run.hi + 1), std::min(e, t1 - run.lo)});
    }
  }
  take({e, e});
  if (pending.begin < pending.end) f(pending.begin, pending.end);
}

}  // namespace qwen1m
