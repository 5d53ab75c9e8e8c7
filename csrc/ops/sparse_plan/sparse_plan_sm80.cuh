#pragma once
/// sparse_plan on sm_80 and later: one block for each list of a group of heads, its verticals or
/// its runs. No scratch: the scores are read nine times.
///
/// A radix select over 4 bits a pass finds the k-th largest score: every thread counts its scores
/// in a column of its own in shared memory, so that no atomic decides anything. Then the scores are
/// walked in ascending order, 4,096 a step: all threads say which they take, and warp 0 turns the
/// bits into entries. Bound: memory, 36 bytes a score and list. Compiled and emulated, not yet run
/// on a GPU.

#include <limits>

#include "arch/arch.h"
#include "common/sparse/top_k.h"
#include "qwen1m/sparse_plan.h"

namespace qwen1m {

struct SparsePlanSm80 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kDigitBits = 4, kDigits = 1 << kDigitBits;
  static constexpr int kWordsPerLane = 4;            // of warp 0
  static constexpr int kWords = 32 * kWordsPerLane;  // of 32 scores: a step
  static constexpr int kStep = 32 * kWords;
  static_assert(kWords % kWarps == 0 && kDigits <= kWarps);

  struct Params {
    SparsePlanParams args;
  };
  static Q1M_HOST_DEVICE int64_t num_blocks(const SparsePlanParams& p) {
    return 2 * (p.v_size.size(0) / p.group);
  }

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    int32_t count[kDigits][kThreads];  // of the digits that a thread has met
    int32_t total[kDigits];
    uint32_t above[kWords], equal[kWords];  // of a step: scores above the k-th largest, and equal
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm80);
  using SharedSmem = arch::Shared<Smem>;

  // --- Scores --------------------------------------------------------------------------------
  /// The list that the block makes.
  struct List {
    const SparsePlanParams& p;
    int64_t head;    // first of the group
    bool verticals;  // else runs
    int32_t n, k;

    Q1M_DEVICE List(const SparsePlanParams& params, int64_t block)
        : p(params), head(block / 2 * params.group), verticals(block % 2 == 0) {
      n = static_cast<int32_t>(p.vertical_score.size(1));
      int64_t largest = 0;
      for (int64_t h = head; h < head + p.group; ++h) {
        const int64_t size = arch::global_load((verticals ? p.v_size : p.s_size).at(h));
        if (size > largest) largest = size;
      }
      k = largest < n ? static_cast<int32_t>(largest) : n;
    }
    /// A score as an integer of the same order, the forced ones above all.
    Q1M_DEVICE uint32_t order(int32_t i) const {
      if (i < (verticals ? kForcedVerticals : kForcedSlashes)) return ~uint32_t{0};
      const auto& score = verticals ? p.vertical_score : p.slash_score;
      float sum = arch::global_load(score.at(head, i));
      for (int64_t h = 1; h < p.group; ++h) sum += arch::global_load(score.at(head + h, i));
      return score_order(sum);
    }
  };

  // --- Select --------------------------------------------------------------------------------
  struct Threshold {
    uint32_t kth;   // the k-th largest
    int32_t equal;  // how many that equal it are taken
  };
  static Q1M_DEVICE Threshold select(const List& list, SharedSmem smem) {
    const int thread = arch::thread_index(), lane = arch::lane_index(), warp = arch::warp_index();
    const auto count = Q1M_SHARED_MEMBER(smem, count);
    const auto total = Q1M_SHARED_MEMBER(smem, total);
    uint32_t found = 0;
    int32_t remaining = list.k;
    for (int low = 32 - kDigitBits; low >= 0; low -= kDigitBits) {
      Q1M_UNROLL
      for (int digit = 0; digit < kDigits; ++digit) arch::shared_store(count[digit][thread], 0);
      for (int32_t i = thread; i < list.n; i += kThreads) {
        const uint32_t x = list.order(i);
        if (low < 32 - kDigitBits && x >> (low + kDigitBits) != found) continue;
        const auto at = count[static_cast<int>(x >> low & (kDigits - 1))][thread];
        arch::shared_store(at, arch::shared_load(at) + 1);
      }
      arch::block_sync();
      if (warp < kDigits) {
        int32_t sum = 0;
        for (int i = lane; i < kThreads; i += 32) sum += arch::shared_load(count[warp][i]);
        Q1M_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += arch::shuffle_xor(sum, lanes);
        if (lane == 0) arch::shared_store(total[warp], sum);
      }
      arch::block_sync();
      uint32_t digit = kDigits - 1;
      for (; digit > 0; --digit) {
        const int32_t have = arch::shared_load(total[static_cast<int>(digit)]);
        if (have >= remaining) break;
        remaining -= have;
      }
      found = found << kDigitBits | digit;
    }
    return {found, remaining};
  }

  // --- Take ----------------------------------------------------------------------------------
  struct Range {
    int64_t begin, end;
  };
  /// Keys of a stage, and the offsets that can meet them.
  static Q1M_DEVICE Range keys_of(const SparsePlanParams& p, int stage) {
    const int64_t intra = p.dual_chunk.intra_begin(p.segment_begin);
    const int64_t successive = p.dual_chunk.successive_begin(p.segment_begin);
    return stage == 0   ? Range{0, successive}
           : stage == 1 ? Range{successive, intra}
                        : Range{intra, p.vertical_score.size(1)};
  }
  static Q1M_DEVICE Range offsets_of(const SparsePlanParams& p, int stage) {
    const auto [b, e] = keys_of(p, stage);
    if (b >= e) return {0, 0};
    const int64_t first = p.segment_begin - e;
    return {first > 0 ? first : 0, p.vertical_score.size(1) - b};
  }
  /// What an empty list receives under `fallback`: entries first + i step, i < count.
  struct Fallback {
    int64_t first, step, count;
  };
  static Q1M_DEVICE Fallback fallback_of(const List& list, int stage) {
    const auto [b, e] = keys_of(list.p, stage);
    const int64_t n = e - b, every = n / kFallbackEntries;
    return {list.verticals ? b : offsets_of(list.p, stage).begin, every > 1 ? every : 1,
            !list.p.fallback       ? 0
            : n < kFallbackEntries ? n
                                   : kFallbackEntries};
  }

  static Q1M_DEVICE void store_run(const List& list, int stage, int32_t index, int which,
                                   int64_t value) {
    for (int64_t h = list.head; h < list.head + list.p.group; ++h) {
      arch::global_store(list.p.runs.at(h, stage, index, which), static_cast<int32_t>(value));
    }
  }
  static Q1M_DEVICE void store_vertical(const List& list, int32_t index, int64_t key) {
    for (int64_t h = list.head; h < list.head + list.p.group; ++h) {
      arch::global_store(list.p.verticals.at(h, index), static_cast<int32_t>(key));
    }
  }

  /// Sum over the lanes below this one, and over all.
  static Q1M_DEVICE int32_t sum_below(int32_t mine, int32_t& all) {
    const int lane = arch::lane_index();
    int32_t sum = mine;
    Q1M_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int32_t other = arch::shuffle(sum, lane >= lanes ? lane - lanes : lane);
      if (lane >= lanes) sum += other;
    }
    all = arch::shuffle(sum, 31);
    return sum - mine;
  }
  /// Maximum over the lanes below this one and `before`, and over all.
  static Q1M_DEVICE int32_t max_below(int32_t mine, int32_t before, int32_t& all) {
    const int lane = arch::lane_index();
    int32_t most = mine;
    Q1M_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int32_t other = arch::shuffle(most, lane >= lanes ? lane - lanes : lane);
      if (lane >= lanes && other > most) most = other;
    }
    all = arch::shuffle(most, 31);
    if (before > all) all = before;
    const int32_t below = arch::shuffle(most, lane > 0 ? lane - 1 : 0);
    return lane > 0 && below > before ? below : before;
  }

  /// Calls take(i) for this lane's bits of a step, ascending.
  template <typename Take>
  static Q1M_DEVICE void for_each_bit(const uint32_t (&words)[kWordsPerLane], int32_t first,
                                      const Take& take) {
    Q1M_UNROLL
    for (int w = 0; w < kWordsPerLane; ++w) {
      if (words[w] == 0) continue;
      for (int bit = 0; bit < 32; ++bit) {
        if (words[w] >> bit & 1) take(first + 32 * w + bit);
      }
    }
  }

  /// What warp 0 carries from step to step; uniform.
  struct Progress {
    int32_t equal;             // that may still be taken
    int32_t count[kStages];    // entries of each stage
    int32_t last = -1;         // taken
    int32_t last_of[kStages];  // taken in the stage's offsets
  };

  /// Keeps the first of the equal ones in `words`, as many as are left; the lane's words.
  static Q1M_DEVICE void keep_equal(uint32_t (&words)[kWordsPerLane], Progress& progress) {
    int32_t mine = 0, all = 0;
    for_each_bit(words, 0, [&](int32_t) { ++mine; });
    int32_t left = progress.equal - sum_below(mine, all);
    progress.equal = progress.equal > all ? progress.equal - all : 0;
    if (left >= mine) return;
    Q1M_UNROLL
    for (int w = 0; w < kWordsPerLane; ++w) {
      for (int bit = 0; bit < 32; ++bit) {
        if (words[w] >> bit & 1 && --left < 0) words[w] &= ~(uint32_t{1} << bit);
      }
    }
  }

  static Q1M_DEVICE void take_verticals(const List& list, const uint32_t (&words)[kWordsPerLane],
                                        int32_t first, Progress& progress) {
    int32_t start = 0;  // of the stage's entries in the list
    Q1M_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      const auto [b, e] = keys_of(list.p, stage);
      int32_t mine = 0, all = 0;
      for_each_bit(words, first, [&](int32_t key) { mine += key >= b && key < e; });
      int32_t index = start + progress.count[stage] + sum_below(mine, all);
      for_each_bit(words, first, [&](int32_t key) {
        if (key >= b && key < e) store_vertical(list, index++, key);
      });
      progress.count[stage] += all;
      // Keys of later stages are only met when this stage's are complete.
      start += progress.count[stage] > 0 ? progress.count[stage]
                                         : static_cast<int32_t>(fallback_of(list, stage).count);
    }
  }

  static Q1M_DEVICE void take_runs(const List& list, const uint32_t (&words)[kWordsPerLane],
                                   int32_t first, Progress& progress) {
    const int64_t apart = list.p.exact ? 1 : list.p.tile_tokens;
    int32_t mine = -1;
    for_each_bit(words, first, [&](int32_t offset) { mine = offset; });
    int32_t last = 0;
    const int32_t before = max_below(mine, progress.last, last);
    Q1M_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      const auto [b, e] = offsets_of(list.p, stage);
      // An offset begins a run if the one taken before it is far away, or no offset of the stage.
      int32_t starts = 0, all = 0, previous = before, latest = -1;
      for_each_bit(words, first, [&](int32_t offset) {
        if (offset >= b && offset < e) {
          starts += previous < b || offset - (previous + 1) >= apart;
          latest = offset;
        }
        previous = offset;
      });
      int32_t index = progress.count[stage] + sum_below(starts, all);
      previous = before;
      for_each_bit(words, first, [&](int32_t offset) {
        if (offset >= b && offset < e && (previous < b || offset - (previous + 1) >= apart)) {
          store_run(list, stage, index, 0, offset);
          if (index > 0) store_run(list, stage, index - 1, 1, previous + 1);
          ++index;
        }
        previous = offset;
      });
      progress.count[stage] += all;
      max_below(latest, progress.last_of[stage], progress.last_of[stage]);
    }
    progress.last = last;
  }

  /// Closes the last runs, fills empty lists, writes the counts; by one thread.
  static Q1M_DEVICE void finish(const List& list, Progress& progress) {
    int32_t start = 0;
    Q1M_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      int32_t& count = progress.count[stage];
      if (count > 0) {
        if (!list.verticals) store_run(list, stage, count - 1, 1, progress.last_of[stage] + 1);
      } else {
        const Fallback entries = fallback_of(list, stage);
        const int64_t apart = list.p.exact ? 1 : list.p.tile_tokens;
        for (int64_t i = 0; i < entries.count; ++i) {
          const int64_t value = entries.first + i * entries.step;
          if (list.verticals) {
            store_vertical(list, start + count++, value);
          } else {
            if (i == 0 || entries.step - 1 >= apart) store_run(list, stage, count++, 0, value);
            store_run(list, stage, count - 1, 1, value + 1);
          }
        }
      }
      start += count;
      for (int64_t h = list.head; h < list.head + list.p.group; ++h) {
        const auto& to = list.verticals ? list.p.vertical_count : list.p.run_count;
        arch::global_store(to.at(h, stage), count);
      }
    }
  }

  /// Says of the step's scores which are above and which equal to the k-th largest.
  static Q1M_DEVICE void compare(const List& list, uint32_t kth, int32_t first, SharedSmem smem) {
    const int lane = arch::lane_index();
    for (int word = arch::warp_index(); word < kWords; word += kWarps) {
      const int32_t i = first + 32 * word + lane;
      const uint32_t x = i < list.n ? list.order(i) : 0;
      const bool there = i < list.n;
      uint32_t above = uint32_t{there && x > kth} << lane;
      uint32_t equal = uint32_t{there && x == kth} << lane;
      Q1M_UNROLL
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        above |= arch::shuffle_xor(above, lanes);
        equal |= arch::shuffle_xor(equal, lanes);
      }
      if (lane == 0) {
        arch::shared_store(Q1M_SHARED_MEMBER(smem, above)[word], above);
        arch::shared_store(Q1M_SHARED_MEMBER(smem, equal)[word], equal);
      }
    }
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    const List list(p.args, arch::block_index());
    const int lane = arch::lane_index();
    const Threshold threshold = list.k > 0 ? select(list, smem) : Threshold{~uint32_t{0}, 0};
    Progress progress{.equal = threshold.equal, .count = {}, .last = -1, .last_of = {-1, -1, -1}};
    for (int32_t first = 0; first < list.n && list.k > 0; first += kStep) {
      compare(list, threshold.kth, first, smem);
      arch::block_sync();
      if (arch::warp_index() == 0) {
        uint32_t words[kWordsPerLane], equal[kWordsPerLane];
        Q1M_UNROLL
        for (int w = 0; w < kWordsPerLane; ++w) {
          words[w] = arch::shared_load(Q1M_SHARED_MEMBER(smem, above)[kWordsPerLane * lane + w]);
          equal[w] = arch::shared_load(Q1M_SHARED_MEMBER(smem, equal)[kWordsPerLane * lane + w]);
        }
        keep_equal(equal, progress);
        Q1M_UNROLL
        for (int w = 0; w < kWordsPerLane; ++w) words[w] |= equal[w];
        const int32_t mine = first + 32 * kWordsPerLane * lane;
        if (list.verticals) {
          take_verticals(list, words, mine, progress);
        } else {
          take_runs(list, words, mine, progress);
        }
      }
      arch::block_sync();
    }
    if (arch::thread_index() == 0) finish(list, progress);
  }
};

}  // namespace qwen1m
