// CPU backend of prefill_attention: cuts the queries into tiles, lets common/attention walk each of
// them over its keys, normalises.
#include "ops/prefill_attention/prefill_attention_cpu.h"

#include <algorithm>
#include <vector>

#include "common/attention/attention_check.h"
#include "common/attention/query_tile.h"
#include "common/dispatch.h"

namespace qwen1m {
namespace {

/// Rows that share each page of keys while it is in the L1 and L2 caches. Their queries and outputs
/// are 6 bytes per row and dimension (bf16): 300 KB of a 1 MB L2 at head_dim 128.
constexpr int64_t kTargetRows = 384;

/// Tokens per tile. A result does not depend on the cut (block_kernel.h), so it may follow the
/// number of threads: tiles shrink until each thread has a few of them to balance the load with.
int64_t tile_tokens(const PrefillAttentionParams& p, int lanes, int64_t group, int workers) {
  const int64_t tokens = p.q.size(0), kv_heads = p.k_cache.size(1);
  int64_t n = lanes * std::max<int64_t>(1, kTargetRows / (lanes * group));
  constexpr int64_t kTilesPerWorker = 4, kFewestTokens = 16;
  while (n >= 2 * kFewestTokens && (tokens + n - 1) / n * kv_heads < kTilesPerWorker * workers) {
    n /= 2;
  }
  return n;
}

struct Task {
  QueryTile tile;
  int64_t row;  // of q and out, of the tile's first token
};

/// All tiles of the call, the longest first: a long one that starts last would run alone.
std::vector<Task> cut_tiles(const PrefillAttentionParams& p, int64_t max_tokens) {
  const int64_t kv_heads = p.k_cache.size(1), group = p.q.size(1) / kv_heads;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < p.kv_len.size(0); ++b) {
    const int64_t first_row = *p.cu_q.at(b), rows = *p.cu_q.at(b + 1) - first_row;
    const int64_t end = *p.kv_len.at(b), begin = end - rows;
    for_each_tile(p.dual_chunk, begin, end, max_tokens, [&](int64_t token, int64_t num_tokens) {
      const int64_t row = first_row + token - begin;
      for (int64_t h = 0; h < kv_heads; ++h) {
        tasks.push_back({{.q_offset = row * p.q.stride(0) + h * group * p.q.stride(1),
                          .batch = b,
                          .kv_head = h,
                          .first_token = token,
                          .num_tokens = num_tokens,
                          .logit_scale = p.logit_scale.at(b)},
                         row});
      }
    });
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.tile.num_tokens * a.tile.last_token() > b.tile.num_tokens * b.tile.last_token();
  });
  return tasks;
}

template <typename T>
void store_tile(const PrefillAttentionParams& p, const Task& task, int64_t group,
                const TileWalker& walker) {
  const auto out = p.out.as<T>();
  for (int64_t i = 0; i < task.tile.num_tokens * group; ++i) {
    const AttentionRow row = walker.row(i);
    const int64_t t = task.row + i / group, h = task.tile.kv_head * group + i % group;
    const float norm = row.norm();
    T* o = out.at(t, h);
    for (int64_t d = 0; d < out.size(2); ++d) o[d] = T(row.o[d * row.stride] * norm);
    if (p.lse) *p.lse.at(t, h) = row.lse(task.tile.scale(0));
  }
}

}  // namespace

void prefill_attention_cpu(const PrefillAttentionParams& p, const ParallelFor& parallel_for,
                           BlockKernels kernels) {
  check_attention(p);
  const AttentionContext context = attention_context(p);
  const int64_t max_tokens =
      tile_tokens(p, kernels.data->lanes, context.group, parallel_for.max_workers);
  const std::vector<Task> tasks = cut_tiles(p, max_tokens);
  int64_t max_rows = 0;
  for (const Task& task : tasks) {
    max_rows = std::max(max_rows, task.tile.num_tokens * context.group);
  }

  const auto num_tasks = static_cast<int64_t>(tasks.size());
  std::vector<TileWalker> walkers;
  for (int64_t i = 0; i < std::min<int64_t>(num_tasks, parallel_for.max_workers); ++i) {
    walkers.emplace_back(kernels, context, max_rows);
  }
  parallel_for(num_tasks, [&](int64_t i, int worker) {
    const Task& task = tasks[static_cast<size_t>(i)];
    TileWalker& walker = walkers[static_cast<size_t>(worker)];
    const int64_t end = task.tile.last_token() + 1;
    walker.walk(task.tile, 0, end, end);
    dispatch_dtype(p.out.dtype,
                   [&](auto zero) { store_tile<decltype(zero)>(p, task, context.group, walker); });
  });
}

void prefill_attention_cpu(const PrefillAttentionParams& p, const ParallelFor& parallel_for) {
  prefill_attention_cpu(p, parallel_for, prefill_kernels(cpu_isa(), p.q.dtype));
}

}  // namespace qwen1m
