#include "ops/sparse_plan/sparse_plan_check.h"

#include <limits>
#include <string>

#include "common/attention/attention_check.h"

namespace qwen1m {
namespace {

void check_layout(ArgCheck& args, const SparsePlanParams& p) {
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
  const int64_t end = p.vertical_score.size(1), heads = args.size("q_heads");
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
}

}  // namespace

void check_sparse_plan_layout(const SparsePlanParams& p) {
  ArgCheck args("sparse_plan");
  check_layout(args, p);
}

void check_sparse_plan(const SparsePlanParams& p) {
  ArgCheck args("sparse_plan");
  check_layout(args, p);
  const int64_t end = p.vertical_score.size(1), heads = args.size("q_heads");
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

}  // namespace qwen1m
