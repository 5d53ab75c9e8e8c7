// CPU backend of sparse_plan: one radix select per list (common/sparse/top_k.h), whose ascending
// indices become the verticals and, neighbours joined, the runs.
#include <limits>

#include "common/sparse/tile_keys.h"
#include "common/sparse/top_k.h"
#include "ops/sparse_plan/sparse_plan_check.h"
#include "qwen1m/sparse_plan.h"

namespace qwen1m {
namespace {

int64_t segment_end(const SparsePlanParams& p) { return p.vertical_score.size(1); }

/// The scores of a group of heads as integers to compare, the first `forced` above all.
class GroupScores {
 public:
  GroupScores(const TensorView<const float, 2>& scores, int64_t head, int64_t group, int64_t forced)
      : scores_(scores), head_(head), group_(group), forced_(forced) {}

  uint32_t operator()(int64_t i) const {
    if (i < forced_) return std::numeric_limits<uint32_t>::max();
    float sum = *scores_.at(head_, i);
    for (int64_t h = 1; h < group_; ++h) sum += *scores_.at(head_ + h, i);
    return score_order(sum);
  }

 private:
  const TensorView<const float, 2>& scores_;
  int64_t head_, group_, forced_;
};

int64_t largest(const TensorView<const int64_t, 1>& sizes, int64_t head, int64_t group,
                int64_t limit) {
  int64_t size = 0;
  for (int64_t h = head; h < head + group; ++h) size = std::max(size, *sizes.at(h));
  return std::min(size, limit);
}

void plan_verticals(const SparsePlanParams& p, const std::array<KeyRange, kStages>& stages,
                    int64_t head) {
  const int64_t end = segment_end(p);
  std::vector<int32_t> selected;
  top_k(end, largest(p.v_size, head, p.group, end),
        GroupScores(p.vertical_score, head, p.group, kForcedVerticals),
        [&](int64_t key) { selected.push_back(static_cast<int32_t>(key)); });
  for (int64_t h = head; h < head + p.group; ++h) {
    int32_t* out = p.verticals.at(h);
    size_t next = 0;
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const auto [b, e] = stages[static_cast<size_t>(stage)];
      int32_t* const first = out;
      for (; next < selected.size() && selected[next] < e; ++next) *out++ = selected[next];
      if (out == first && p.fallback) {
        for (int64_t k = 0; k < std::min(kFallbackEntries, e - b); ++k) {
          *out++ = static_cast<int32_t>(b + k * std::max<int64_t>(1, (e - b) / kFallbackEntries));
        }
      }
      *p.vertical_count.at(h, stage) = static_cast<int32_t>(out - first);
    }
  }
}

void plan_runs(const SparsePlanParams& p, const std::array<KeyRange, kStages>& stages,
               int64_t head) {
  const int64_t end = segment_end(p);
  const int64_t apart = p.exact ? 1 : p.tile_tokens;  // runs nearer than this are one
  std::array<int32_t, kStages> count{};
  std::array<OffsetRun*, kStages> runs;
  for (int64_t stage = 0; stage < kStages; ++stage) {
    runs[static_cast<size_t>(stage)] = reinterpret_cast<OffsetRun*>(p.runs.at(head, stage));
  }
  const auto add = [&](size_t stage, int64_t offset) {
    OffsetRun* last = runs[stage] + count[stage] - 1;
    const auto o = static_cast<int32_t>(offset);
    if (count[stage] > 0 && o - last->hi < apart) {
      last->hi = o + 1;
    } else {
      runs[stage][count[stage]++] = {o, o + 1};
    }
  };
  top_k(end, largest(p.s_size, head, p.group, end),
        GroupScores(p.slash_score, head, p.group, kForcedSlashes), [&](int64_t offset) {
          for (size_t stage = 0; stage < kStages; ++stage) {
            const auto [b, e] = stages[stage];
            if (b < e && offset >= p.segment_begin - e && offset <= end - 1 - b) add(stage, offset);
          }
        });
  for (size_t stage = 0; stage < kStages && p.fallback; ++stage) {
    const auto [b, e] = stages[stage];
    if (count[stage] > 0) continue;
    const int64_t first = std::max<int64_t>(0, p.segment_begin - e);
    for (int64_t k = 0; k < std::min(kFallbackEntries, e - b); ++k) {
      add(stage, first + k * std::max<int64_t>(1, (e - b) / kFallbackEntries));
    }
  }
  for (int64_t h = head; h < head + p.group; ++h) {
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const auto s = static_cast<size_t>(stage);
      if (h != head) {
        std::copy_n(runs[s], count[s], reinterpret_cast<OffsetRun*>(p.runs.at(h, stage)));
      }
      *p.run_count.at(h, stage) = count[s];
    }
  }
}

}  // namespace

void sparse_plan_cpu(const SparsePlanParams& p, const ParallelFor& parallel_for) {
  check_sparse_plan(p);
  const auto stages = stage_keys(p.dual_chunk, p.segment_begin, segment_end(p));
  const int64_t groups = p.v_size.size(0) / p.group;
  parallel_for(2 * groups, [&](int64_t task, int) {
    const int64_t head = task / 2 * p.group;
    if (task % 2 == 0) {
      plan_verticals(p, stages, head);
    } else {
      plan_runs(p, stages, head);
    }
  });
}

}  // namespace qwen1m
