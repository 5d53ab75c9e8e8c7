// CPU backend of sparse_plan: one radix select per list (common/sparse/top_k.h), whose ascending
// indices become the verticals and, neighbours joined, the runs.
#include <limits>
#include <string>

#include "common/attention/attention_check.h"
#include "common/sparse/tile_keys.h"
#include "common/sparse/top_k.h"
#include "qwen1m/sparse_plan.h"

namespace qwen1m {
namespace {

int64_t segment_end(const SparsePlanParams& p) { return p.vertical_score.size(1); }

void check(const SparsePlanParams& p) {
  ArgCheck args("sparse_plan");
  args.shape("vertical_score", p.vertical_score, {"q_heads", "segment_end"});
  args.shape("slash_score", p.slash_score, {"q_heads", "segment_end"});
  args.dense_from(1, "vertical_score", p.vertical_score);
  args.dense_from(1, "slash_score", p.slash_score);
  args.shape("v_size", p.v_size, {"q_heads"});
  args.shape("s_size", p.s_size, {"q_heads"});
  args.shape("verticals", p.verticals, {"q_heads", "vertical capacity"});
  args.shape("vertical_count", p.vertical_count, {"q_heads", kStages});
  args.shape("runs", p.runs, {"q_heads", kStages, "run capacity", 2});
  args.shape("run_count", p.run_count, {"q_heads", kStages});
  args.dense_from(0, "verticals", p.verticals);
  args.dense_from(0, "vertical_count", p.vertical_count);
  args.dense_from(0, "runs", p.runs);
  args.dense_from(0, "run_count", p.run_count);
  const DualChunk& chunks = p.dual_chunk;
  check_dual_chunk(args, chunks);
  const int64_t end = segment_end(p), heads = args.size("q_heads");
  args.require(end <= std::numeric_limits<int32_t>::max(), "vertical_score", "less than 2^31 keys",
               end);
  if (p.segment_begin < 0 || p.segment_begin >= end) {
    args.fail("segment_begin", "a token in [0, segment_end=" + std::to_string(end) + ")",
              std::to_string(p.segment_begin));
  }
  if (chunks.chunk(p.segment_begin) != chunks.chunk(end - 1)) {
    args.fail("segment_begin",
              "a token of the Dual Chunk of the last one, which begins at " +
                  std::to_string(chunks.intra_begin(end - 1)),
              std::to_string(p.segment_begin));
  }
  args.require(p.tile_tokens > 0, "tile_tokens", "a positive number of tokens", p.tile_tokens);
  if (p.group <= 0 || heads % p.group != 0) {
    args.fail("group", "a divisor of q_heads=" + std::to_string(heads), std::to_string(p.group));
  }
  for (int64_t h = 0; h < heads; ++h) {
    const auto fits = [&](const char* name, int64_t size, const char* list, int64_t have,
                          int64_t need) {
      args.require(size >= 0, std::string(name) + "[" + std::to_string(h) + "]", "a budget >= 0",
                   size);
      if (have < need) {
        args.fail(list,
                  "a capacity of at least " + std::to_string(need) + " for " + name + "[" +
                      std::to_string(h) + "]=" + std::to_string(size),
                  std::to_string(have));
      }
    };
    fits("v_size", *p.v_size.at(h), "verticals", args.size("vertical capacity"),
         sparse_vertical_capacity(*p.v_size.at(h), end));
    fits("s_size", *p.s_size.at(h), "runs", args.size("run capacity"),
         sparse_run_capacity(*p.s_size.at(h), end, p.tile_tokens, p.exact));
  }
}

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
  check(p);
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
