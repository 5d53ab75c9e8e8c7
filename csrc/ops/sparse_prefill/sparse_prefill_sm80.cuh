#pragma once
/// sparse_prefill on sm_80 and later without wgmma: bf16, head_dim 64 or 128.
///
/// A block is 128 threads and one tile: 128 rows of one head, 32 a warp
/// (common/attention/tile_sm80.cuh). Keys come in pieces of 64 (sparse_prefill_tiles.h) by
/// cp.async, from where they lie in the cache or from the gathered verticals; while a piece's
/// scores are computed its values are on their way, and the next keys while its values are used.
/// Warp 0 derives the next piece while the softmax of this one is computed:
///
///   copies     K0 |      V0      |      K1        |      V1      | ...
///   products      |  S0 softmax0 |  O += P0 V0    |  S1 softmax1 | ...
///   warp 0        |  walk to K1  |                |  walk to K2  | ...
///
/// Shared memory: 65 KB at D = 128, two blocks on an A100's multiprocessor. Compiled and emulated,
/// not yet run on a GPU.

#include "arch/arch.h"
#include "common/attention/tile_sm80.cuh"
#include "ops/sparse_prefill/sparse_prefill_mask.h"
#include "ops/sparse_prefill/sparse_prefill_tiles.h"

namespace qwen1m {

template <int kHeadDim>
struct SparsePrefillSm80 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  using Tile = AttentionTileSm80<D>;
  static constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads, kCluster = 1;
  static constexpr int kWarpRows = Tile::kWarpRows, kHalves = Tile::kHalves;
  static_assert(kKeys == kPieceKeys && kGroupRows % kWarpRows == 0);

  struct Params {
    SparsePrefillParams args;
  };
  static Q1M_HOST_DEVICE int64_t num_blocks(const SparsePrefillParams& p) {
    return SparseTiles(p).count * p.q.size(1);
  }
  using Queries = typename Tile::Queries;
  using Keys = typename Tile::Keys;
  using Block = SparseBlock<kKeys>;

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    alignas(1024) typename Queries::Storage q;  // rotated; at the end the output
    typename Keys::Storage k, v;
    Block block[2];  // of this piece and the next
    struct Source {
      int32_t page, row;  // SparsePiece's
    } source[2];
    SparseWalk::State walk;  // between two pieces; of warp 0
    PrefillTile tile;
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm80);
  using SharedSmem = arch::Shared<Smem>;

  // --- Produce -------------------------------------------------------------------------------
  /// Derives the next piece; by warp 0, whose walk waits in shared memory meanwhile, because its
  /// registers would spill. `first`: it begins.
  static Q1M_DEVICE void find_piece(const Params& p, const PrefillTile& tile, SharedSmem smem,
                                    int place, bool first) {
    const auto at = Q1M_SHARED_MEMBER(smem, walk);
    SparseWalk walk(p.args, tile);
    if (!first) {
      walk.state = {arch::shared_load(Q1M_SHARED_MEMBER(at, stage)),
                    arch::shared_load(Q1M_SHARED_MEMBER(at, vertical)),
                    arch::shared_load(Q1M_SHARED_MEMBER(at, vertical_end)),
                    arch::shared_load(Q1M_SHARED_MEMBER(at, run)),
                    arch::shared_load(Q1M_SHARED_MEMBER(at, key))};
    }
    SparsePiece piece;
    const bool more = walk.next(piece, true);
    const auto block = Q1M_SHARED_MEMBER(smem, block)[place];
    const auto source = Q1M_SHARED_MEMBER(smem, source)[place];
    arch::warp_sync();  // all have read the state
    if (more) write_piece(block, 0, piece);
    if (arch::lane_index() == 0) {
      write_facts(block, piece.last_key, walk.state.stage, piece.num_rows);
      arch::shared_store(Q1M_SHARED_MEMBER(source, page), piece.page);
      arch::shared_store(Q1M_SHARED_MEMBER(source, row), piece.row);
      arch::shared_store(Q1M_SHARED_MEMBER(at, stage), walk.state.stage);
      arch::shared_store(Q1M_SHARED_MEMBER(at, vertical), walk.state.vertical);
      arch::shared_store(Q1M_SHARED_MEMBER(at, vertical_end), walk.state.vertical_end);
      arch::shared_store(Q1M_SHARED_MEMBER(at, run), walk.state.run);
      arch::shared_store(Q1M_SHARED_MEMBER(at, key), walk.state.key);
    }
    arch::warp_sync();
  }

  /// Starts the copy of a piece's keys (which = 0) or values. Rows that hold no numbers become
  /// zero: 0 * NaN is NaN.
  static Q1M_DEVICE void load_piece(const SparsePrefillParams& p, const PrefillTile& tile,
                                    SharedSmem smem, int place, int which, Keys to) {
    const auto source = Q1M_SHARED_MEMBER(smem, source)[place];
    const int32_t page = arch::shared_load(Q1M_SHARED_MEMBER(source, page));
    const int32_t first = arch::shared_load(Q1M_SHARED_MEMBER(source, row));
    int32_t rows = read_facts(Q1M_SHARED_MEMBER(smem, block)[place]).num_values;
    const bf16* from;
    if (page < 0) {  // the last piece may reach over the end of the list's memory
      const auto list_end = static_cast<int32_t>(p.verticals.size(1));
      rows = list_end - first < kKeys ? list_end - first : kKeys;
      from = p.scratch.as<const bf16>().at(which, tile.q_head, first);
    } else {
      from = (which == 0 ? p.k_cache : p.v_cache).as<const bf16>().at(page, tile.kv_head, first);
    }
    Q1M_NO_UNROLL  // as in the dense kernel: addresses in registers made it spill
        for (int i = arch::thread_index(); i < kKeys * (D / 8); i += kThreads) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      arch::cp_async_16(to.at(row, chunk).template as<void>(), from + i * 8, row < rows);
    }
    arch::cp_async_commit();
  }

  // --- Consume -------------------------------------------------------------------------------
  static Q1M_DEVICE void attend(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    const Queries q{Q1M_SHARED_MEMBER(smem, q)};
    const Keys k{Q1M_SHARED_MEMBER(smem, k)}, v{Q1M_SHARED_MEMBER(smem, v)};
    const auto aside = Q1M_SHARED_MEMBER(smem, tile);
    const int warp = arch::warp_index(), lane = arch::lane_index();
    const int warp_row = warp * kWarpRows, group = warp_row / kGroupRows;
    const float scale_log2 = arch::global_load(p.args.logit_scale.at(0)) * 1.44269504f;
    float o[kHalves][D / 2], s[kHalves][kKeys / 2];
    uint32_t probabilities[kHalves][kKeys / 16][4];
    RowSoftmax softmax[kHalves];
    Q1M_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      Q1M_UNROLL
      for (int i = 0; i < D / 2; ++i) o[half][i] = 0;
    }

    if (warp == 0) find_piece(p, tile, smem, 0, true);
    Tile::put_aside(tile, aside);  // and a barrier
    SparseFacts facts = read_facts(Q1M_SHARED_MEMBER(smem, block)[0]);
    if (facts.stage < kStages) load_piece(p.args, Tile::whole(aside), smem, 0, 0, k);
    int stage = -1;
    for (int place = 0; facts.stage < kStages; place ^= 1) {
      if (facts.stage != stage) {  // between two block barriers, as all uses of the queries are
        stage = facts.stage;
        rotate_queries(p.args, Tile::whole(aside), stage, q, warp_row, kWarpRows, lane, 32);
      }
      arch::cp_async_wait<0>();
      arch::block_sync();  // keys are here; the values of the piece before are done with
      load_piece(p.args, Tile::whole(aside), smem, place, 1, v);
      Tile::multiply_qk(s, q, k, warp);
      Q1M_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const int token =
            arch::shared_load(Q1M_SHARED_MEMBER(aside, first_token)) + warp_row + half * 16;
        mask_scores<kKeys>(s[half], Q1M_SHARED_MEMBER(smem, block)[place], facts.last_key, group,
                           token, token + lane / 4);
        softmax[half].template step<true>(s[half], scale_log2);
        softmax[half].rescale(o[half]);
        pack_probabilities<kKeys>(probabilities[half], s[half]);
      }
      if (warp == 0) find_piece(p, Tile::whole(aside), smem, place ^ 1, false);
      arch::cp_async_wait<0>();
      arch::block_sync();  // values are here; the keys are done with; the next piece is known
      facts = read_facts(Q1M_SHARED_MEMBER(smem, block)[place ^ 1]);
      if (facts.stage < kStages) load_piece(p.args, Tile::whole(aside), smem, place ^ 1, 0, k);
      Tile::multiply_pv(o, probabilities, v);
    }

    const PrefillTile all = Tile::whole(aside);
    const float logit_scale = arch::global_load(p.args.logit_scale.at(0));
    Q1M_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      const int first_row = warp_row + half * 16;
      softmax[half].finish(p.args, all, first_row + lane / 4, logit_scale, o[half]);
      Tile::store(p.args, all, q, first_row, o[half]);
    }
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    attend(p, find_tile(p.args, arch::block_index()), smem);
  }
};

}  // namespace qwen1m
