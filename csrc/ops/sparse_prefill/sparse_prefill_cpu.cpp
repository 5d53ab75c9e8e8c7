// CPU backend of sparse_prefill. A tile is one query head's rows; of the keys before it, pages and
// large parts of pages are attended to where they lie, all others (ends of ranges, verticals) are
// copied together into pages of their own, so that the block kernels of dense attention run on full
// pages.
#include "ops/sparse_prefill/sparse_prefill_cpu.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/attention/attention_check.h"
#include "common/attention/query_tile.h"
#include "common/dispatch.h"
#include "common/sparse/tile_keys.h"

namespace qwen1m {
namespace {

using HeadLists = std::array<StageLists, kStages>;

HeadLists head_lists(const SparsePrefillParams& p, int64_t head) {
  const auto keys = stage_keys(p.dual_chunk, p.segment_begin, p.segment_end);
  HeadLists lists;
  const int32_t* verticals = p.verticals.at(head);
  for (int64_t stage = 0; stage < kStages; ++stage) {
    const auto count = static_cast<size_t>(*p.vertical_count.at(head, stage));
    const auto* runs = reinterpret_cast<const OffsetRun*>(p.runs.at(head, stage));
    lists[static_cast<size_t>(stage)] = {
        .keys = keys[static_cast<size_t>(stage)],
        .runs = {runs, static_cast<size_t>(*p.run_count.at(head, stage))},
        .verticals = {verticals, count}};
    verticals += count;
  }
  return lists;
}

/// The keys of a tile and stage on their way into the walker, one worker's. They are collected
/// first, so that each step knows what comes next and can fetch it.
class KeyFeed {
 public:
  KeyFeed(const AttentionContext& context, TileWalker& walker)
      : context_(context),
        walker_(walker),
        row_bytes_(context.head_dim * element_size(context.dtype)),
        k_(static_cast<size_t>(kPageSize * row_bytes_)),
        v_(k_) {}

  /// Keys [begin, end) of the stage. Keys from `first_token` on are masked row by row, so they stay
  /// in their pages, whole or not.
  void add(int64_t begin, int64_t end, int64_t first_token) {
    while (begin < end) {
      const int64_t page = begin / kPageSize, page_begin = page * kPageSize;
      int64_t piece_end = std::min(end, page_begin + kPageSize);
      if (begin < first_token) piece_end = std::min(piece_end, first_token);
      const PageKeys keys{.page = page,
                          .lo = static_cast<int>(begin - page_begin),
                          .hi = static_cast<int>(piece_end - page_begin)};
      const bool in_place = begin >= first_token || piece_end - begin >= kInPlaceKeys;
      (in_place ? in_place_ : gathered_).push_back(keys);
      begin = piece_end;
    }
  }

  bool empty() const { return in_place_.empty() && gathered_.empty(); }

  /// Lets the walker, which is in the stage, attend to what was added; starts anew.
  void visit() {
    for (size_t i = 0; i < in_place_.size(); ++i) {
      if (i + 1 < in_place_.size()) in_place_[i].next_page = in_place_[i + 1].page;
      walker_.visit(in_place_[i]);
    }
    int count = 0;
    for (size_t i = 0; i < gathered_.size(); ++i) {
      if (i + kPiecesAhead < gathered_.size()) fetch(gathered_[i + kPiecesAhead]);
      const PageKeys& keys = gathered_[i];
      for (int lo = keys.lo; lo < keys.hi;) {
        const int rows = std::min(keys.hi - lo, static_cast<int>(kPageSize) - count);
        copy(context_.k_cache, keys.page, lo, rows, k_.data() + count * row_bytes_);
        copy(context_.v_cache, keys.page, lo, rows, v_.data() + count * row_bytes_);
        lo += rows;
        count += rows;
        if (count == kPageSize) walker_.visit_gathered(k_.data(), v_.data(), count), count = 0;
      }
    }
    if (count > 0) walker_.visit_gathered(k_.data(), v_.data(), count);
    in_place_.clear();
    gathered_.clear();
  }

 private:
  /// A step over part of a page costs its rounding to whole register tiles and a pass over the
  /// output, a copy two more passes over the keys. Against copying all parts this is 8 % faster
  /// with tiles of 64 rows and 2 % slower with 128 (28/4 heads of 128, Zen 5, 82 and 68 runs a
  /// head).
  static constexpr int64_t kInPlaceKeys = 48;
  static constexpr size_t kPiecesAhead = 4;

  void copy(const void* cache, int64_t page, int row, int rows, char* to) const {
    std::memcpy(to, walker_.page_rows(cache, page) + row * row_bytes_,
                static_cast<size_t>(rows * row_bytes_));
  }
  /// The first row of a piece; a processor follows the rest of a long one by itself.
  void fetch(const PageKeys& keys) const {
    const char* k = walker_.page_rows(context_.k_cache, keys.page) + keys.lo * row_bytes_;
    const char* v = walker_.page_rows(context_.v_cache, keys.page) + keys.lo * row_bytes_;
    for (int64_t i = 0; i < row_bytes_; i += 64) {
      __builtin_prefetch(k + i);
      __builtin_prefetch(v + i);
    }
  }

  const AttentionContext& context_;
  TileWalker& walker_;
  int64_t row_bytes_;
  std::vector<PageKeys> in_place_, gathered_;
  std::vector<char> k_, v_;  // [128, D]
};

struct Task {
  int64_t head;
  int64_t t0;            // first token of the tile
  int64_t first, count;  // tokens asked for, in the tile
};

/// The tiles of all heads: heads with the most keys first, so that the end of the call has only
/// short tasks to balance with; the tiles of one head stay together, because they share most keys.
std::vector<Task> cut_tiles(const SparsePrefillParams& p, const Segment& segment) {
  const int64_t heads = p.q.size(1), q_end = p.q_begin + p.q.size(0);
  std::vector<int64_t> keys(static_cast<size_t>(heads)), order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  const auto tile_of = [&](int64_t token) {
    return token - (token - segment.begin) % segment.tile_tokens;
  };
  for (const int64_t h : order) {
    for (const StageLists& lists : head_lists(p, h)) {
      for_each_key_range(segment, lists, tile_of(q_end - 1), [&](int64_t begin, int64_t end) {
        keys[static_cast<size_t>(h)] += end - begin;
      });
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return keys[static_cast<size_t>(a)] > keys[static_cast<size_t>(b)];
  });
  std::vector<Task> tasks;
  for (const int64_t h : order) {
    for (int64_t first = p.q_begin; first < q_end;) {
      const int64_t t0 = tile_of(first);
      const int64_t end = std::min(t0 + segment.tile_tokens, q_end);
      tasks.push_back({.head = h, .t0 = t0, .first = first, .count = end - first});
      first = end;
    }
  }
  return tasks;
}

template <typename T>
void store_tile(const SparsePrefillParams& p, const Task& task, const TileWalker& walker,
                float logit_scale) {
  const auto out = p.out.as<T>();
  for (int64_t i = 0; i < task.count; ++i) {
    const AttentionRow row = walker.row(i);
    const int64_t t = task.first - p.q_begin + i;
    const float norm = row.norm();
    T* o = out.at(t, task.head);
    for (int64_t d = 0; d < out.size(2); ++d) o[d] = T(row.o[d * row.stride] * norm);
    if (p.lse) *p.lse.at(t, task.head) = row.lse(logit_scale);
  }
}

}  // namespace

void sparse_prefill_cpu(const SparsePrefillParams& p, const ParallelFor& parallel_for,
                        BlockKernels kernels) {
  check_attention(p);
  if (p.q.size(0) == 0) return;
  AttentionContext context = attention_context(p);
  const int64_t group = context.group;
  context.group = 1;  // each head has its own keys
  const Segment segment{p.segment_begin, p.segment_end, p.tile_tokens, p.exact};
  const float logit_scale = *p.logit_scale.at(0);
  const std::vector<Task> tasks = cut_tiles(p, segment);
  const auto num_tasks = static_cast<int64_t>(tasks.size());

  std::vector<TileWalker> walkers;
  std::vector<KeyFeed> feeds;
  const int64_t workers = std::min<int64_t>(num_tasks, parallel_for.max_workers);
  walkers.reserve(static_cast<size_t>(workers));
  for (int64_t i = 0; i < workers; ++i) {
    walkers.emplace_back(kernels, context, std::min(p.tile_tokens, p.q.size(0)));
    feeds.emplace_back(context, walkers.back());
  }
  parallel_for(num_tasks, [&](int64_t i, int worker) {
    const Task& task = tasks[static_cast<size_t>(i)];
    TileWalker& walker = walkers[static_cast<size_t>(worker)];
    KeyFeed& feed = feeds[static_cast<size_t>(worker)];
    const HeadLists lists = head_lists(p, task.head);
    walker.begin({.q_offset = (task.first - p.q_begin) * p.q.stride(0) + task.head * p.q.stride(1),
                  .batch = 0,
                  .kv_head = task.head / group,
                  .first_token = task.first,
                  .num_tokens = task.count,
                  .logit_scale = p.logit_scale.at(0)});
    const int64_t last_token = task.first + task.count - 1;
    for (int stage = 0; stage < kStages; ++stage) {
      for_each_key_range(segment, lists[static_cast<size_t>(stage)], task.t0,
                         [&](int64_t begin, int64_t end) {
                           feed.add(begin, std::min(end, last_token + 1), task.t0);
                         });
      if (feed.empty()) continue;
      walker.enter(static_cast<Stage>(stage));
      feed.visit();
    }
    walker.end();
    dispatch_dtype(p.out.dtype,
                   [&](auto zero) { store_tile<decltype(zero)>(p, task, walker, logit_scale); });
  });
}

void sparse_prefill_cpu(const SparsePrefillParams& p, const ParallelFor& parallel_for) {
  sparse_prefill_cpu(p, parallel_for, prefill_kernels(cpu_isa(), p.q.dtype));
}

}  // namespace qwen1m
