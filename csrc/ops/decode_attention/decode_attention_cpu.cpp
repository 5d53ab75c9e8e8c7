// CPU backend of decode_attention: the few query rows of a KV head are one tile, their keys are cut
// into pieces of a fixed length, each piece is walked by one thread (common/attention), and the
// partial results are merged in ascending order.
#include "ops/decode_attention/decode_attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "common/attention/attention_check.h"
#include "common/attention/query_tile.h"
#include "common/dispatch.h"
#include "common/fp8_cache.h"

namespace qwen1m {
namespace {

/// Keys of a piece. Absolute multiples: the cut depends on kv_len alone, and a piece's result not
/// even on that. A partial result is (D + 2) floats per row against 2 D elements per key that were
/// read for it: less than 1 % of the traffic for the 7 rows of a KV head of Qwen2.5-7B in bf16.
constexpr int64_t kPieceKeys = 16 * kPageSize;

struct Task {
  QueryTile tile;
  int64_t q_token;  // index of the tile's first token in q
  int64_t num_pieces;
  int64_t first_partial;  // of [piece][row], counted in rows
};

int64_t partial_floats(const AttentionContext& context) { return context.head_dim + 2; }

std::vector<Task> cut_tiles(const DecodeAttentionParams& p, const AttentionContext& context) {
  const int64_t q_tokens = p.q.size(1);
  std::vector<Task> tasks;
  int64_t partials = 0;
  for (int64_t b = 0; b < p.kv_len.size(0); ++b) {
    const int64_t end = *p.kv_len.at(b), begin = end - q_tokens;
    if (end == 0) continue;
    for_each_tile(p.dual_chunk, begin, end, q_tokens, [&](int64_t token, int64_t num_tokens) {
      for (int64_t h = 0; h < context.kv_heads; ++h) {
        const int64_t q_token = token - begin, pieces = (token + num_tokens - 1) / kPieceKeys + 1;
        tasks.push_back({.tile = {.q_offset = b * p.q.stride(0) + q_token * p.q.stride(1) +
                                              h * context.group * p.q.stride(2),
                                  .batch = b,
                                  .kv_head = h,
                                  .first_token = token,
                                  .num_tokens = num_tokens,
                                  .logit_scale = p.logit_scale.at(b, q_token),
                                  .logit_scale_stride = p.logit_scale.stride(1),
                                  .key_scale = cache_scale(p.k_scale, h)},
                         .q_token = q_token,
                         .num_pieces = pieces,
                         .first_partial = partials});
        partials += pieces * num_tokens * context.group;
      }
    });
  }
  return tasks;
}

/// Neighbouring pieces that one worker takes, so that the next piece's first page is on its way
/// when the last one ends: of all KV heads, page by page, where there is enough work for that. The
/// number of workers may decide here: a piece's result does not notice.
struct Run {
  std::span<const Task> heads;  // the same tokens in neighbouring KV heads
  int64_t begin, end;           // pieces
};

/// Ever shorter ones: a worker begins few, and the last ones even out the workers' speeds.
std::vector<Run> cut_runs(const std::vector<Task>& tasks, int64_t kv_heads, int64_t num_pieces,
                          int64_t workers) {
  const int64_t heads = num_pieces / kv_heads >= 2 * workers ? kv_heads : 1;
  std::vector<Run> runs;
  int64_t left = num_pieces / heads;
  for (size_t i = 0; i < tasks.size(); i += static_cast<size_t>(heads)) {
    const std::span<const Task> together(&tasks[i], static_cast<size_t>(heads));
    for (int64_t begin = 0, length; begin < tasks[i].num_pieces; begin += length, left -= length) {
      length = std::clamp<int64_t>(left / (2 * workers), 1, tasks[i].num_pieces - begin);
      runs.push_back({together, begin, begin + length});
    }
  }
  return runs;
}

/// o (D values), m, l of one row.
void store_partial(const AttentionRow& row, int64_t head_dim, float* partial) {
  for (int64_t d = 0; d < head_dim; ++d) partial[d] = row.o[d * row.stride];
  partial[head_dim] = row.m;
  partial[head_dim + 1] = row.l;
}

/// Sums the partial results of a row, `stride` floats apart; the sum of o goes to `o`.
AttentionRow merge_partials(const float* partials, int64_t stride, int64_t count, int64_t head_dim,
                            float logit_scale, float* o) {
  float m = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) m = std::max(m, partials[i * stride + head_dim]);
  const float reference = std::max(m, -std::numeric_limits<float>::max());
  float l = 0;
  std::fill_n(o, head_dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* partial = partials + i * stride;
    const float weight = std::exp2((partial[head_dim] - reference) * (logit_scale * kLog2E));
    l += weight * partial[head_dim + 1];
    for (int64_t d = 0; d < head_dim; ++d) o[d] += weight * partial[d];
  }
  return {.o = o, .stride = 1, .m = m, .l = l};
}

template <typename T>
void merge_tile(const DecodeAttentionParams& p, const AttentionContext& context, const Task& task,
                const float* partials, float* o) {
  const int64_t dim = context.head_dim, group = context.group;
  const int64_t rows = task.tile.num_tokens * group, floats = partial_floats(context);
  const auto out = p.out.as<T>();
  for (int64_t i = 0; i < rows; ++i) {
    const float logit_scale = task.tile.scale(i / group);
    const AttentionRow row = merge_partials(partials + (task.first_partial + i) * floats,
                                            rows * floats, task.num_pieces, dim, logit_scale, o);
    const int64_t t = task.q_token + i / group, h = task.tile.kv_head * group + i % group;
    const float norm = row.norm() * cache_scale(p.v_scale, task.tile.kv_head);
    T* to = out.at(task.tile.batch, t, h);
    for (int64_t d = 0; d < dim; ++d) to[d] = T(row.o[d] * norm);
    if (p.lse) *p.lse.at(task.tile.batch, t, h) = row.lse(logit_scale);
  }
}

template <typename T>
void store_empty(const DecodeAttentionParams& p, int64_t b) {
  const auto out = p.out.as<T>();
  for (int64_t t = 0; t < out.size(1); ++t) {
    for (int64_t h = 0; h < out.size(2); ++h) {
      std::fill_n(out.at(b, t, h), out.size(3), T(0.0f));
      if (p.lse) *p.lse.at(b, t, h) = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

void decode_attention_cpu(const DecodeAttentionParams& p, const ParallelFor& parallel_for,
                          BlockKernels kernels) {
  check_attention(p);
  dispatch_dtype(p.out.dtype, [&](auto zero) {
    for (int64_t b = 0; b < p.kv_len.size(0); ++b) {
      if (*p.kv_len.at(b) == 0) store_empty<decltype(zero)>(p, b);
    }
  });
  const AttentionContext context = attention_context(p);
  const std::vector<Task> tasks = cut_tiles(p, context);
  if (tasks.empty()) return;

  int64_t max_rows = 0, num_partials = 0, num_pieces = 0;
  for (const Task& task : tasks) {
    const int64_t rows = task.tile.num_tokens * context.group;
    max_rows = std::max(max_rows, rows);
    num_partials += task.num_pieces * rows;
    num_pieces += task.num_pieces;
  }
  const std::vector<Run> runs =
      cut_runs(tasks, context.kv_heads, num_pieces, parallel_for.max_workers);

  const int64_t floats = partial_floats(context);
  const auto num_runs = static_cast<int64_t>(runs.size());
  const int64_t workers = std::min<int64_t>(num_runs, parallel_for.max_workers);
  const size_t heads = runs.front().heads.size();
  struct Worker {
    std::vector<TileWalker> walkers;  // one per head of a run
    std::vector<QueryTile> tiles;
  };
  std::vector<Worker> states(static_cast<size_t>(workers));
  for (Worker& state : states) {
    state.tiles.resize(heads);
    state.walkers.reserve(heads);
    for (size_t h = 0; h < heads; ++h) state.walkers.emplace_back(kernels, context, max_rows);
  }
  // Not a vector: zeroing what is written anyway would cost a pass over it.
  const std::unique_ptr<float[]> memory(
      new float[static_cast<size_t>(num_partials * floats + workers * context.head_dim)]);
  float* const partials = memory.get();
  float* const merged = partials + num_partials * floats;

  parallel_for(num_runs, [&](int64_t i, int worker) {
    const auto& [tasks_of_run, begin, end] = runs[static_cast<size_t>(i)];
    auto& [walkers, tiles] = states[static_cast<size_t>(worker)];
    for (size_t h = 0; h < heads; ++h) tiles[h] = tasks_of_run[h].tile;
    const int64_t rows = tiles.front().num_tokens * context.group;
    for (int64_t piece = begin; piece < end; ++piece) {
      TileWalker::walk(walkers, tiles, piece * kPieceKeys, (piece + 1) * kPieceKeys,
                       end * kPieceKeys);
      for (size_t h = 0; h < heads; ++h) {
        float* partial = partials + (tasks_of_run[h].first_partial + piece * rows) * floats;
        for (int64_t r = 0; r < rows; ++r) {
          store_partial(walkers[h].row(r), context.head_dim, partial + r * floats);
        }
      }
    }
  });
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    dispatch_dtype(p.out.dtype, [&](auto zero) {
      merge_tile<decltype(zero)>(p, context, tasks[static_cast<size_t>(i)], partials,
                                 merged + worker * context.head_dim);
    });
  });
}

void decode_attention_cpu(const DecodeAttentionParams& p, const ParallelFor& parallel_for) {
  decode_attention_cpu(p, parallel_for, decode_kernels(cpu_isa(), p.q.dtype));
}

}  // namespace qwen1m
