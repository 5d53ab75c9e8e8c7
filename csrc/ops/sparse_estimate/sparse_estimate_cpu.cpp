// CPU backend of sparse_estimate. The keys are cut into pieces of a fixed length; a task is one
// piece of one KV head, its query heads in turn over each page of keys while that is in the cache.
// The first pass leaves m and l of each row and piece, the second recomputes the scores and adds up
// probabilities. Pieces share diagonals at their borders: n - 1 sums of each piece are kept apart
// and added at the end, in order, so that the number of threads does not show.
#include "ops/sparse_estimate/sparse_estimate_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/attention/attention_check.h"
#include "common/attention/query_tile.h"

namespace qwen1m {
namespace {

constexpr int64_t kPieceKeys = 32 * kPageSize;

class Estimate {
 public:
  Estimate(const SparseEstimateParams& p, BlockKernels kernels, int workers)
      : p_(p),
        rows_(p.q.size(0)),
        group_(p.q.size(1) / p.k_cache.size(1)),
        first_token_(p.segment_end - rows_),
        pieces_((p.segment_end + kPieceKeys - 1) / kPieceKeys),
        context_{.q = p.q.data,
                 .k_cache = p.k_cache.data,
                 .v_cache = nullptr,
                 .dtype = p.q.dtype,
                 .cache_dtype = p.k_cache.dtype,
                 .q_token_stride = p.q.stride(0),
                 .q_head_stride = p.q.stride(1),
                 .kv_heads = p.k_cache.size(1),
                 .group = 1,  // a block's lanes are consecutive tokens of one head
                 .head_dim = p.k_cache.size(3),
                 .block_table = p.block_table,
                 .rope_table = p.rope_table,
                 .dual_chunk = p.dual_chunk,
                 .critical = p.critical},
        partials_(static_cast<size_t>(p.q.size(1) * pieces_ * rows_)),
        totals_(static_cast<size_t>(p.q.size(1) * rows_)),
        borders_(static_cast<size_t>(p.q.size(1) * pieces_ * (rows_ - 1))) {
    const int lanes = choose_lanes(kernels, rows_).lanes;
    const int64_t lane_span = (rows_ + lanes - 1) / lanes * lanes;
    workers_.reserve(static_cast<size_t>(workers));
    for (int i = 0; i < workers; ++i) {
      Worker& worker = workers_.emplace_back();
      worker.walkers.reserve(static_cast<size_t>(group_));
      for (int64_t h = 0; h < group_; ++h) worker.walkers.emplace_back(kernels, context_, rows_);
      worker.scores.resize(static_cast<size_t>(kPageSize * (2 * lanes + 32)));
      worker.column.resize(kPageSize);
      worker.slash.resize(static_cast<size_t>(group_ * (kPieceKeys + kPageSize + lane_span + 16)));
    }
  }

  int64_t num_tasks() const { return context_.kv_heads * pieces_; }

  void sum(int64_t task, int index) {
    Worker& worker = workers_[static_cast<size_t>(index)];
    const int64_t kv_head = task / pieces_, piece = task % pieces_;
    start(worker, kv_head);
    for_each_page(worker, piece, [&](TileWalker& walker, int64_t, const PageKeys& keys) {
      PageTile page = walker.pack_keys(keys);
      for (LaneBlock& block : walker.blocks()) {
        walker.kernel().sum(block, page, context_.head_dim, worker.scores.data());
        page.next_k = nullptr, page.page_bytes = 0;  // once is enough
      }
    });
    for (int64_t g = 0; g < group_; ++g) {
      for_each_row(
          worker.walkers[static_cast<size_t>(g)], [&](int64_t row, LaneBlock& b, int lane) {
            if (row < rows_) {
              partials_[partial(kv_head * group_ + g, piece, row)] = {b.m[lane], b.l[lane]};
            }
          });
    }
    finish(worker);
  }

  /// Merges the pieces' sums, in order.
  void merge() {
    for (int64_t h = 0; h < p_.q.size(1); ++h) {
      for (int64_t row = 0; row < rows_; ++row) {
        Sum total{-std::numeric_limits<float>::infinity(), 0};
        for (int64_t i = 0; i < pieces_; ++i) {
          total.m = std::max(total.m, partials_[partial(h, i, row)].m);
        }
        for (int64_t i = 0; i < pieces_; ++i) {
          const Sum& part = partials_[partial(h, i, row)];
          if (part.l > 0) total.l += part.l * std::exp2((part.m - total.m) * log2_scale());
        }
        totals_[static_cast<size_t>(h * rows_ + row)] = total;
      }
    }
  }

  void spread(int64_t task, int index) {
    Worker& worker = workers_[static_cast<size_t>(index)];
    const int64_t kv_head = task / pieces_, piece = task % pieces_;
    const int64_t begin = piece * kPieceKeys, end = std::min(begin + kPieceKeys, p_.segment_end);
    start(worker, kv_head);
    for (int64_t g = 0; g < group_; ++g) {
      for_each_row(worker.walkers[static_cast<size_t>(g)], [&](int64_t row, LaneBlock& b,
                                                               int lane) {
        const bool used = row < rows_;  // lanes without a row add nothing
        const Sum total =
            used ? totals_[static_cast<size_t>((kv_head * group_ + g) * rows_ + row)] : Sum{0, 0};
        b.m[lane] = total.m;
        b.l[lane] = used ? 1 / total.l : 0;
      });
    }
    std::fill(worker.slash.begin(), worker.slash.end(), 0.0f);
    // slash[i] of a head is offset i + lowest.
    const int64_t stride = static_cast<int64_t>(worker.slash.size()) / group_;
    const int64_t last_page = (end - 1) / kPageSize;
    const int64_t lowest = first_token_ - (last_page * kPageSize + kPageSize - 1);
    for_each_page(worker, piece, [&](TileWalker& walker, int64_t g, const PageKeys& keys) {
      PageTile page = walker.pack_keys(keys);
      float* column = worker.column.data();
      std::fill_n(column, kPageSize, 0.0f);
      for (LaneBlock& block : walker.blocks()) {
        const int64_t offset = block.first_token - page.begin - (kPageSize - 1);
        walker.kernel().spread(block, page, context_.head_dim, worker.scores.data(), column,
                               worker.slash.data() + g * stride + offset - lowest);
        page.next_k = nullptr, page.page_bytes = 0;
      }
      float* out = p_.vertical.at(kv_head * group_ + g, page.begin);
      // A page with a Dual Chunk border is visited once for each stage.
      std::copy(column + keys.lo, column + keys.hi, out + keys.lo);
    });
    finish(worker);

    // Offsets [first_token + n - end, ...) come from this piece and those before it.
    const int64_t own = p_.segment_end - end, top = p_.segment_end - 1 - begin;
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t h = kv_head * group_ + g;
      const float* const at_own = worker.slash.data() + g * stride + own - lowest;
      std::copy_n(at_own, top - own + 1, p_.slash.at(h, own));
      for (int64_t i = 0; i < rows_ - 1; ++i) {
        borders_[border(h, piece) + static_cast<size_t>(i)] = at_own[i - (rows_ - 1)];
      }
    }
  }

  void add_borders() {
    for (int64_t h = 0; h < p_.q.size(1); ++h) {
      for (int64_t piece = 0; piece + 1 < pieces_; ++piece) {  // below the last is the future
        const int64_t own = p_.segment_end - (piece + 1) * kPieceKeys;
        for (int64_t i = 0; i < rows_ - 1; ++i) {
          const int64_t o = own - (rows_ - 1) + i;
          if (o >= 0) *p_.slash.at(h, o) += borders_[border(h, piece) + static_cast<size_t>(i)];
        }
      }
    }
  }

 private:
  struct Sum {
    float m, l;
  };
  struct Worker {
    std::vector<TileWalker> walkers;  // of the query heads of a KV head
    std::vector<float> scores, column, slash;
  };

  float log2_scale() const { return *p_.logit_scale.at(0) * kLog2E; }
  size_t partial(int64_t head, int64_t piece, int64_t row) const {
    return static_cast<size_t>((head * pieces_ + piece) * rows_ + row);
  }
  size_t border(int64_t head, int64_t piece) const {
    return static_cast<size_t>((head * pieces_ + piece) * (rows_ - 1));
  }

  void start(Worker& worker, int64_t kv_head) {
    for (int64_t g = 0; g < group_; ++g) {
      worker.walkers[static_cast<size_t>(g)].begin(
          {.q_offset = (kv_head * group_ + g) * p_.q.stride(1),
           .batch = 0,
           .kv_head = kv_head,
           .first_token = first_token_,
           .num_tokens = rows_,
           .logit_scale = p_.logit_scale.at(0)});
    }
  }
  void finish(Worker& worker) {
    // In reverse: each begin has saved what the one before it set up.
    for (size_t i = worker.walkers.size(); i-- > 0;) worker.walkers[i].end();
  }

  template <typename F>
  void for_each_row(TileWalker& walker, F&& f) {
    int64_t row = 0;
    for (LaneBlock& block : walker.blocks()) {
      for (int lane = 0; lane < block.lanes; ++lane, ++row) f(row, block, lane);
    }
  }

  /// Calls f(walker, head of the group, keys) for the piece's pages, stage by stage.
  template <typename F>
  void for_each_page(Worker& worker, int64_t piece, F&& f) {
    const DualChunk& chunks = p_.dual_chunk;
    const int64_t borders[] = {0, chunks.successive_begin(first_token_),
                               chunks.intra_begin(first_token_), p_.segment_end};
    for (int stage = 0; stage < 3; ++stage) {
      const int64_t begin = std::max(borders[stage], piece * kPieceKeys);
      const int64_t end = std::min(borders[stage + 1], (piece + 1) * kPieceKeys);
      if (begin >= end) continue;
      for (TileWalker& walker : worker.walkers) walker.enter(static_cast<Stage>(stage));
      for (int64_t page = begin / kPageSize; page * kPageSize < end; ++page) {
        const int64_t page_begin = page * kPageSize;
        PageKeys keys{.page = page,
                      .lo = static_cast<int>(std::max(begin - page_begin, int64_t{0})),
                      .hi = static_cast<int>(std::min(end - page_begin, kPageSize)),
                      .next_page = page_begin + kPageSize < end ? page + 1 : -1};
        for (int64_t g = 0; g < group_; ++g, keys.next_page = -1) {
          f(worker.walkers[static_cast<size_t>(g)], g, keys);
        }
      }
    }
  }

  const SparseEstimateParams& p_;
  int64_t rows_, group_, first_token_, pieces_;
  AttentionContext context_;
  std::vector<Worker> workers_;
  std::vector<Sum> partials_;   // [head][piece][row]
  std::vector<Sum> totals_;     // [head][row]
  std::vector<float> borders_;  // [head][piece][row - 1]
};

}  // namespace

void sparse_estimate_cpu(const SparseEstimateParams& p, const ParallelFor& parallel_for,
                         BlockKernels kernels) {
  check_attention(p);
  const int64_t pieces = (p.segment_end + kPieceKeys - 1) / kPieceKeys * p.k_cache.size(1);
  Estimate estimate(p, kernels,
                    static_cast<int>(std::min<int64_t>(pieces, parallel_for.max_workers)));
  parallel_for(estimate.num_tasks(), [&](int64_t task, int worker) { estimate.sum(task, worker); });
  estimate.merge();
  parallel_for(estimate.num_tasks(),
               [&](int64_t task, int worker) { estimate.spread(task, worker); });
  estimate.add_borders();
}

void sparse_estimate_cpu(const SparseEstimateParams& p, const ParallelFor& parallel_for) {
  sparse_estimate_cpu(p, parallel_for, prefill_kernels(cpu_isa(), p.q.dtype));
}

}  // namespace qwen1m
