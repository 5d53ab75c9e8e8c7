#pragma once
/// sparse_estimate on sm_80 and later: bf16, head_dim 64 or 128, up to 64 rows.
///
/// A block is up to four query heads of a KV head, a warp each with all 64 rows, and a span of keys
/// (sparse_estimate_spans.h); the heads share each tile of 32 keys, which comes by cp.async while
/// the one before is multiplied. A warp owns its head's sums, so that nothing is added across
/// warps: column sums are complete in registers, diagonal sums are carried from tile to tile in
/// shared memory. Every sum has one order: results are the same in every run.
///
/// A diagonal belongs to the span that its key of row 0 lies in; a span therefore looks 64 keys
/// into the next one, and multiplies them twice.
///
/// Shared memory: 90 KB at D = 128. Bound: tensor cores, 2 x 2 D flops per row and key. Compiled
/// and emulated, not yet run on a GPU.

#include <cmath>

#include "arch/arch.h"
#include "common/attention/tile_rows.h"
#include "common/attention/tile_sm80.cuh"
#include "ops/sparse_estimate/sparse_estimate_spans.h"

namespace qwen1m {

/// What the two passes over the keys share.
template <int kHeadDim>
struct EstimateTile {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kKeys = kEstimateKeys;
  static constexpr int kThreads = 32 * kEstimateHeads;  // at most
  static constexpr int kRowTiles = kEstimateRows / 16;  // 16-row products of a warp
  using Queries = RowTile<D, kEstimateRows>;
  using Keys = RowTile<D, kKeys>;
  /// s[t][4 j + 2 h + e]: row 16 t + lane / 4 + 8 h, key 8 j + 2 (lane % 4) + e.
  using Scores = float[kRowTiles][kKeys / 2];

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    alignas(1024) typename Queries::Storage q[kEstimateHeads];  // rotated
    typename Keys::Storage k[2];
  };
  using SharedSmem = arch::Shared<Smem>;

  // --- The block's work ----------------------------------------------------------------------
  struct Work {
    int64_t kv_head, head;  // the warp's query head
    bool has_head;          // the last block of a group may have warps without
    int64_t span;
    int32_t first_key, end_key;  // of the span

    Q1M_DEVICE Work(const SparseEstimateArgs& args, int64_t block) {
      const EstimateGrid& grid = args.grid;
      const int64_t group = args.op.q.size(1) / args.op.k_cache.size(1);
      const int64_t part = block % grid.blocks_of_group;  // side by side: the same keys
      block /= grid.blocks_of_group;
      span = args.first_span + block % args.num_spans;
      kv_head = block / args.num_spans;
      const int64_t in_group = part * grid.heads + arch::warp_index();
      has_head = in_group < group;
      head = kv_head * group + (has_head ? in_group : 0);
      first_key = static_cast<int32_t>(span * grid.span);
      const int64_t end = (span + 1) * grid.span;
      end_key = static_cast<int32_t>(end < args.op.segment_end ? end : args.op.segment_end);
    }
  };

  /// The keys of a stage for the rows, all of which lie in one chunk.
  struct Stages {
    int32_t successive, intra, end;
    Q1M_DEVICE explicit Stages(const SparseEstimateParams& p)
        : successive(static_cast<int32_t>(p.dual_chunk.successive_begin(p.segment_end - 1))),
          intra(static_cast<int32_t>(p.dual_chunk.intra_begin(p.segment_end - 1))),
          end(static_cast<int32_t>(p.segment_end)) {}
    Q1M_DEVICE int of(int32_t key) const { return key >= intra ? 2 : key >= successive ? 1 : 0; }
    Q1M_DEVICE int32_t end_of(int stage) const {
      return stage == 0 ? successive : stage == 1 ? intra : end;
    }
  };

  // --- Produce -------------------------------------------------------------------------------
  static Q1M_DEVICE void load_tile(const SparseEstimateArgs& args, const Work& work,
                                   int32_t first_key, SharedSmem smem) {
    const SparseEstimateParams& p = args.op;
    if (first_key >= p.segment_end) return;
    const Keys to{Q1M_SHARED_MEMBER(smem, k)[first_key / kKeys % 2]};
    const int32_t page = arch::global_load(p.block_table.at(0, first_key / kPageSize));
    const bf16* from = p.k_cache.as<const bf16>().at(page, work.kv_head, first_key % kPageSize);
    const auto threads = static_cast<int>(32 * args.grid.heads);
    for (int i = arch::thread_index(); i < kKeys * (D / 8); i += threads) {
      arch::cp_async_16(to.at(i / (D / 8), i % (D / 8)).template as<void>(), from + i * 8,
                        first_key + i / (D / 8) < p.segment_end);
    }
    arch::cp_async_commit();
  }

  // --- Consume -------------------------------------------------------------------------------
  static Q1M_DEVICE void rotate(const SparseEstimateParams& p, const Work& work, int stage,
                                Queries to) {
    const auto rows = static_cast<int32_t>(p.q.size(0));
    const PrefillTile tile{.batch = 0,
                           .q_head = static_cast<int32_t>(work.head),
                           .kv_head = static_cast<int32_t>(work.kv_head),
                           .first_token = static_cast<int32_t>(p.segment_end) - rows,
                           .num_tokens = rows,
                           .row = 0};
    arch::warp_sync();  // the products of the stage before have read the old queries
    rotate_queries(p, tile, stage, to, 0, kEstimateRows, arch::lane_index(), 32);
    arch::warp_sync();
  }

  static Q1M_DEVICE void multiply(Scores& s, Queries q, Keys k) {
    const int lane = arch::opaque(arch::lane_index());
    Q1M_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      Q1M_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) s[t][i] = 0;
    }
    Q1M_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[kRowTiles][4];
      Q1M_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        arch::ldmatrix_x4(a[t], q.at(16 * t + lane % 16, 2 * step + lane / 16));
      }
      Q1M_UNROLL
      for (int j = 0; j < kKeys / 8; j += 2) {  // two groups of 8 keys
        uint32_t b[4];
        arch::ldmatrix_x4(b, k.at(8 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        Q1M_UNROLL
        for (int t = 0; t < kRowTiles; ++t) {
          arch::mma_m16n8k16(AttentionTileSm80<D>::quad(s[t], j), a[t], {b[0], b[1]});
          arch::mma_m16n8k16(AttentionTileSm80<D>::quad(s[t], j + 1), a[t], {b[2], b[3]});
        }
      }
    }
  }

  /// Scores that do not count become -inf: keys outside of [lo, hi), keys behind the row's token,
  /// and rows that are not there.
  static Q1M_DEVICE void mask(Scores& s, const SparseEstimateParams& p, int32_t first_key,
                              int32_t lo, int32_t hi) {
    const auto rows = static_cast<int32_t>(p.q.size(0)), end = static_cast<int32_t>(p.segment_end);
    if (rows == kEstimateRows && lo <= first_key && first_key + kKeys <= hi &&
        first_key + kKeys <= end - rows + 1) {
      return;
    }
    const int lane = arch::lane_index();
    Q1M_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      Q1M_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) {
        const int32_t row = 16 * t + lane / 4 + i / 2 % 2 * 8;
        const int32_t key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row >= rows || key < lo || key >= hi || key > end - rows + row) s[t][i] = -INFINITY;
      }
    }
  }

  /// Walks tiles from `begin` on (a multiple of kKeys) to `end`: visit(s, first_key, lo, hi) with
  /// the masked scores of keys [lo, hi), once for each stage that a tile has keys of, then
  /// leave(first_key) after each tile, also of those behind the segment.
  template <typename Visit, typename Leave>
  static Q1M_DEVICE void walk(const SparseEstimateArgs& args, const Work& work, SharedSmem smem,
                              int32_t begin, int32_t end, const Visit& visit, const Leave& leave) {
    const Stages stages(args.op);
    const Queries q{Q1M_SHARED_MEMBER(smem, q)[arch::warp_index()]};
    int rotated = -1;
    load_tile(args, work, begin, smem);
    for (int32_t first = begin; first < end; first += kKeys) {
      arch::cp_async_wait<0>();
      arch::block_sync();  // the tile is here; the one before is done with
      if (first + kKeys < end) load_tile(args, work, first + kKeys, smem);
      if (!work.has_head) continue;
      const int32_t past = first + kKeys < stages.end ? first + kKeys : stages.end;
      for (int32_t lo = first; lo < past;) {
        const int stage = stages.of(lo);
        const int32_t hi = past < stages.end_of(stage) ? past : stages.end_of(stage);
        if (stage != rotated) rotate(args.op, work, stage, q);
        rotated = stage;
        Scores s;
        multiply(s, q, {Q1M_SHARED_MEMBER(smem, k)[first / kKeys % 2]});
        mask(s, args.op, first, lo, hi);
        visit(s, first, lo, hi);
        lo = hi;
      }
      leave(first);
    }
  }
};

/// Maximum and sum of each row over a span.
template <int kHeadDim>
struct EstimateStatisticsSm80 {
  using Tile = EstimateTile<kHeadDim>;
  static constexpr int kThreads = Tile::kThreads, kRowTiles = Tile::kRowTiles;
  struct Params {
    SparseEstimateArgs args;
  };
  using Smem = typename Tile::Smem;
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm80);

  static Q1M_DEVICE void run(const Params& p) {
    const SparseEstimateParams& op = p.args.op;
    const typename Tile::Work work(p.args, arch::block_index());
    const float scale_log2 = arch::global_load(op.logit_scale.at(0)) * 1.44269504f;
    // Of this thread's keys only: the four lanes of a row meet at the end.
    float m[kRowTiles][2], l[kRowTiles][2];
    Q1M_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      m[t][0] = m[t][1] = -INFINITY;
      l[t][0] = l[t][1] = 0;
    }
    Tile::walk(
        p.args, work, arch::shared_memory<Smem>(), work.first_key, work.end_key,
        [&](const typename Tile::Scores& s, int32_t, int32_t, int32_t) {
          Q1M_UNROLL
          for (int t = 0; t < kRowTiles; ++t) {
            Q1M_UNROLL
            for (int h = 0; h < 2; ++h) {
              float maximum = m[t][h];
              Q1M_UNROLL
              for (int j = 0; j < Tile::kKeys / 8; ++j) {
                maximum = fmaxf(maximum, fmaxf(s[t][4 * j + 2 * h], s[t][4 * j + 2 * h + 1]));
              }
              if (maximum == -INFINITY) continue;
              float sum = 0;
              Q1M_UNROLL
              for (int j = 0; j < Tile::kKeys / 8; ++j) {
                sum += arch::exp2_approx((s[t][4 * j + 2 * h] - maximum) * scale_log2) +
                       arch::exp2_approx((s[t][4 * j + 2 * h + 1] - maximum) * scale_log2);
              }
              l[t][h] = l[t][h] * arch::exp2_approx((m[t][h] - maximum) * scale_log2) + sum;
              m[t][h] = maximum;
            }
          }
        },
        [](int32_t) {});
    if (!work.has_head) return;
    const int lane = arch::lane_index();
    Q1M_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        float maximum = fmaxf(m[t][h], arch::shuffle_xor(m[t][h], 1));
        maximum = fmaxf(maximum, arch::shuffle_xor(maximum, 2));
        float sum = m[t][h] == -INFINITY
                        ? 0.0f
                        : l[t][h] * arch::exp2_approx((m[t][h] - maximum) * scale_log2);
        sum += arch::shuffle_xor(sum, 1);
        sum += arch::shuffle_xor(sum, 2);
        const int row = 16 * t + lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < op.q.size(0)) {
          const EstimateStatistics to = statistics_of_span(op, work.head, work.span, row);
          arch::global_store(to.m, maximum);
          arch::global_store(to.l, sum);
        }
      }
    }
  }
};

/// The statistics of each row over all spans: a block a head, a thread group of 8 a row.
struct EstimateCombine {
  static constexpr int kShares = 8;  // threads of a row
  static constexpr int kThreads = kEstimateRows * kShares;
  struct Params {
    SparseEstimateArgs args;
  };
  struct Smem {
    char unused[16];
  };

  static Q1M_DEVICE void run(const Params& p) {
    const SparseEstimateParams& op = p.args.op;
    const int64_t head = arch::block_index();
    const int row = arch::thread_index() / kShares, share = arch::thread_index() % kShares;
    const float scale_log2 = arch::global_load(op.logit_scale.at(0)) * 1.44269504f;
    const bool there = row < op.q.size(0);
    float m = -INFINITY, l = 0;
    for (int64_t span = share; there && span < p.args.grid.num_spans; span += kShares) {
      const EstimateStatistics from = statistics_of_span(op, head, span, row);
      merge(m, l, arch::global_load_coherent(from.m), arch::global_load_coherent(from.l),
            scale_log2);
    }
    Q1M_UNROLL
    for (int lanes = 1; lanes < kShares; lanes *= 2) {
      merge(m, l, arch::shuffle_xor(m, lanes), arch::shuffle_xor(l, lanes), scale_log2);
    }
    arch::block_sync();  // all have read what is overwritten now
    if (there && share == 0) {
      const EstimateStatistics to = combined_statistics(op, head, row);
      arch::global_store(to.m, m);
      arch::global_store(to.l, 1.0f / l);
    }
  }

 private:
  static Q1M_DEVICE void merge(float& m, float& l, float other_m, float other_l, float scale_log2) {
    const float maximum = fmaxf(m, other_m);
    if (maximum == -INFINITY) return;
    l = l * arch::exp2_approx((m - maximum) * scale_log2) +
        other_l * arch::exp2_approx((other_m - maximum) * scale_log2);
    m = maximum;
  }
};

/// Column and diagonal sums of a span.
template <int kHeadDim>
struct EstimateSumsSm80 {
  using Tile = EstimateTile<kHeadDim>;
  static constexpr int kThreads = Tile::kThreads, kRowTiles = Tile::kRowTiles;
  static constexpr int kKeys = Tile::kKeys;
  /// Diagonals that a tile meets: key - row from -63 to 31.
  static constexpr int kDiagonals = kEstimateRows + kKeys;
  /// Eight rows of probabilities, with zeros on both sides, so that every diagonal has eight.
  static constexpr int kPad = 8, kPitch = 56;
  static_assert(kPitch >= kKeys + 2 * kPad && kPitch % 32 == 24, "rows in distinct banks");

  struct Params {
    SparseEstimateArgs args;
  };

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    typename Tile::Smem tile;
    alignas(16) float rows[kEstimateHeads][8 * kPitch];
    float diagonals[kEstimateHeads][kDiagonals];  // [i]: of key - row = first_key - 63 + i
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm80);
  using SharedSmem = arch::Shared<Smem>;

  // --- Sums ----------------------------------------------------------------------------------
  /// Adds the columns of a visit over the rows, and writes those of [lo, hi).
  static Q1M_DEVICE void add_columns(const SparseEstimateParams& p, int64_t head,
                                     const typename Tile::Scores& s, int32_t first_key, int32_t lo,
                                     int32_t hi) {
    const int lane = arch::lane_index();
    Q1M_UNROLL
    for (int j = 0; j < kKeys / 8; ++j) {
      Q1M_UNROLL
      for (int e = 0; e < 2; ++e) {
        float sum = 0;
        Q1M_UNROLL
        for (int t = 0; t < kRowTiles; ++t) sum += s[t][4 * j + e] + s[t][4 * j + 2 + e];
        Q1M_UNROLL
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += arch::shuffle_xor(sum, lanes);
        const int32_t key = first_key + 8 * j + 2 * lane + e;
        if (lane < 4 && key >= lo && key < hi) arch::global_store(p.vertical.at(head, key), sum);
      }
    }
  }

  /// Adds the diagonals of a visit, eight rows at a time, to those of the warp.
  static Q1M_DEVICE void add_diagonals(SharedSmem smem, const typename Tile::Scores& s) {
    const int lane = arch::lane_index(), warp = arch::warp_index();
    const auto rows = Q1M_SHARED_MEMBER(smem, rows)[warp];
    const auto diagonals = Q1M_SHARED_MEMBER(smem, diagonals)[warp];
    Q1M_UNROLL
    for (int eight = 0; eight < 2 * kRowTiles; ++eight) {
      const int t = eight / 2, h = eight % 2;
      Q1M_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) {
        Q1M_UNROLL
        for (int e = 0; e < 2; ++e) {
          arch::shared_store(rows[lane / 4 * kPitch + kPad + 8 * j + 2 * (lane % 4) + e],
                             s[t][4 * j + 2 * h + e]);
        }
      }
      arch::warp_sync();
      // Diagonal i of the eight rows: key - row = i - 7, from the first of both.
      for (int i = lane; i < kKeys + 7; i += 32) {
        float sum = 0;
        Q1M_UNROLL
        for (int row = 0; row < 8; ++row) {
          sum += arch::shared_load(rows[row * kPitch + kPad + i - 7 + row]);
        }
        const auto to = diagonals[kEstimateRows - 1 - 8 * eight - 7 + i];
        arch::shared_store(to, arch::shared_load(to) + sum);
      }
      arch::warp_sync();
    }
  }

  /// Writes the diagonals that have met their last row, and goes on to the next tile.
  static Q1M_DEVICE void leave_tile(const SparseEstimateParams& p, const typename Tile::Work& work,
                                    SharedSmem smem, int32_t first_key) {
    const int lane = arch::lane_index();
    const auto diagonals = Q1M_SHARED_MEMBER(smem, diagonals)[arch::warp_index()];
    const int32_t diagonal = first_key - (kEstimateRows - 1) + lane;  // key - row
    const auto rows = static_cast<int32_t>(p.q.size(0)), end = static_cast<int32_t>(p.segment_end);
    const int32_t offset = end - rows - diagonal;
    const bool mine = diagonal < work.end_key && (work.span == 0 || diagonal >= work.first_key);
    if (mine && offset >= 0 && offset < end) {
      arch::global_store(p.slash.at(work.head, offset), arch::shared_load(diagonals[lane]));
    }
    arch::warp_sync();
    Q1M_UNROLL
    for (int i = 0; i < kDiagonals; i += kKeys) {
      const bool last = i + kKeys == kDiagonals;
      const float next = last ? 0.0f : arch::shared_load(diagonals[last ? 0 : i + kKeys + lane]);
      arch::shared_store(diagonals[i + lane], next);
      arch::warp_sync();
    }
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SparseEstimateParams& op = p.args.op;
    const SharedSmem smem = arch::shared_memory<Smem>();
    const typename Tile::Work work(p.args, arch::block_index());
    const int lane = arch::lane_index(), warp = arch::warp_index();
    const float scale_log2 = arch::global_load(op.logit_scale.at(0)) * 1.44269504f;
    float m[kRowTiles][2], norm[kRowTiles][2];
    Q1M_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * t + lane / 4 + 8 * h;
        m[t][h] = norm[t][h] = 0;
        if (work.has_head && row < op.q.size(0)) {
          const EstimateStatistics from = combined_statistics(op, work.head, row);
          m[t][h] = arch::global_load_coherent(from.m);
          norm[t][h] = arch::global_load_coherent(from.l);
        }
      }
    }
    for (int i = lane; i < 8 * kPitch; i += 32) {
      arch::shared_store(Q1M_SHARED_MEMBER(smem, rows)[warp][i], 0.0f);
    }
    for (int i = lane; i < kDiagonals; i += 32) {
      arch::shared_store(Q1M_SHARED_MEMBER(smem, diagonals)[warp][i], 0.0f);
    }
    arch::warp_sync();  // this very warp overwrites its head's statistics
    // Two tiles more finish the diagonals that begin in the last one.
    const int32_t last =
        work.first_key + (work.end_key - work.first_key + kKeys - 1) / kKeys * kKeys;
    Tile::walk(
        p.args, work, Q1M_SHARED_MEMBER(smem, tile), work.first_key, last + 2 * kKeys,
        [&](typename Tile::Scores& s, int32_t first_key, int32_t lo, int32_t hi) {
          Q1M_UNROLL
          for (int t = 0; t < kRowTiles; ++t) {
            Q1M_UNROLL
            for (int i = 0; i < kKeys / 2; ++i) {
              const int h = i / 2 % 2;
              s[t][i] = arch::exp2_approx((s[t][i] - m[t][h]) * scale_log2) * norm[t][h];
            }
          }
          if (first_key < work.end_key) add_columns(op, work.head, s, first_key, lo, hi);
          add_diagonals(smem, s);
        },
        [&](int32_t first_key) { leave_tile(op, work, smem, first_key); });
  }
};

}  // namespace qwen1m
