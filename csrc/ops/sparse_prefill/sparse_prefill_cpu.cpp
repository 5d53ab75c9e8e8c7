// CPU backend of sparse_prefill. A tile is one query head's rows; of the keys before it, whole
// pages are attended to where they lie, everything else (ends of ranges, verticals) is copied
// together into pages of its own, so that the block kernels of dense attention run on full pages. A
// copy costs a few percent of the products: 16 cache lines a key against 2 D products for every
// row.
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

/// A tile's keys on their way into the walker, one worker's.
class KeyFeed {
 public:
  KeyFeed(const AttentionContext& context, TileWalker& walker)
      : context_(context),
        walker_(walker),
        row_bytes_(context.head_dim * element_size(context.dtype)),
        k_(static_cast<size_t>(kPageSize * row_bytes_)),
        v_(k_) {}

  /// Keys [begin, end) of the stage that the walker is in. Keys from `first_token` on are masked
  /// row by row, so they stay in their pages.
  void add(int64_t begin, int64_t end, int64_t first_token) {
    while (begin < end) {
      const int64_t page = begin / kPageSize, page_begin = page * kPageSize;
      int64_t piece_end = std::min(end, page_begin + kPageSize);
      if (begin < first_token) piece_end = std::min(piece_end, first_token);
      const PageKeys keys{.page = page,
                          .lo = static_cast<int>(begin - page_begin),
                          .hi = static_cast<int>(piece_end - page_begin),
                          .next_page = piece_end < end ? piece_end / kPageSize : -1};
      if (begin >= first_token || piece_end - begin == kPageSize) {
        walker_.visit(keys);
      } else {
        gather(keys);
      }
      begin = piece_end;
    }
  }

  void flush() {
    if (count_ > 0) walker_.visit_gathered(k_.data(), v_.data(), count_);
    count_ = 0;
  }

 private:
  void gather(const PageKeys& keys) {
    const char* k = walker_.page_rows(context_.k_cache, keys.page);
    const char* v = walker_.page_rows(context_.v_cache, keys.page);
    for (int lo = keys.lo; lo < keys.hi;) {
      const int rows = std::min(keys.hi - lo, static_cast<int>(kPageSize) - count_);
      const auto bytes = static_cast<size_t>(rows * row_bytes_);
      std::memcpy(k_.data() + count_ * row_bytes_, k + lo * row_bytes_, bytes);
      std::memcpy(v_.data() + count_ * row_bytes_, v + lo * row_bytes_, bytes);
      lo += rows;
      count_ += rows;
      if (count_ == kPageSize) flush();
    }
  }

  const AttentionContext& context_;
  TileWalker& walker_;
  int64_t row_bytes_;
  std::vector<char> k_, v_;  // [128, D]
  int count_ = 0;
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
                  .logit_scale = logit_scale});
    const int64_t last_token = task.first + task.count - 1;
    for (int stage = 0; stage < kStages; ++stage) {
      bool entered = false;
      for_each_key_range(segment, lists[static_cast<size_t>(stage)], task.t0,
                         [&](int64_t begin, int64_t end) {
                           end = std::min(end, last_token + 1);
                           if (begin >= end) return;
                           if (!entered) walker.enter(static_cast<Stage>(stage));
                           entered = true;
                           feed.add(begin, end, task.t0);
                         });
      feed.flush();
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
