#pragma once
/// sparse_prefill on sm_90a: bf16, head_dim 64 or 128, all three DCA ranges in one online softmax.
///
/// A block is 384 threads and one tile: 128 rows of one head. One producer warp derives the tile's
/// keys from the head's lists (sparse_prefill_tiles.h) and loads them, 64 at a time, by TMA: from
/// where they lie in the cache for a run, from the gathered verticals else
/// (sparse_prefill_gather.cuh). Two pieces of one stage are a block of 128 keys in the ring that
/// two consumer warpgroups empty (common/attention/tile_sm90.cuh); beside each block lies who
/// attends to which of its keys, and consumers mask only where that is not everybody.
///
///   producer    walk | K K V V | walk | K K V V ...    ring of kStages blocks
///
/// For tiles of 256 rows a cluster of two blocks, 128 rows each, shares every load. Both producers
/// walk the tile's keys and note them in their own block; each loads one of the two pieces of a
/// block of keys, and multicasts it to both. So `full` barriers wait for bytes that the other block
/// has asked for too, and a place is loaded anew when the consumers of both have released it. A
/// block without rows of the call's takes part like any other; the keys of the later rows are
/// masked for the earlier ones (one block of keys per tile and head).
///
/// Shared memory: 227 KB at D = 128, 213 KB at D = 64; registers 56 (producer), 224 (consumers).
/// Bound: tensor cores, 4 D flops per row and key loaded; K and V pass from L2 once per 128 rows,
/// or 256.
/// Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "arch/ring.h"
#include "common/attention/tile_sm90.cuh"
#include "ops/sparse_prefill/sparse_prefill_mask.h"
#include "ops/sparse_prefill/sparse_prefill_tiles.h"

namespace qwen1m {

template <int kHeadDim, int kBlocksOfCluster = 1>
struct SparsePrefillSm90 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kCluster = kBlocksOfCluster;
  using Tile = AttentionTileSm90<D, D == 64 ? 6 : 3, 56, kCluster>;
  static constexpr int kKeys = Tile::kKeys;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr uint32_t kPieceBytes = kPieceKeys * 128;    // one panel of a piece
  static constexpr uint16_t kAllBlocks = (1 << kCluster) - 1;  // of the cluster, for multicasts
  static constexpr int64_t kClusterRows = kCluster * kTileTokens;
  static_assert(kKeys == 2 * kPieceKeys && kGroupRows == Tile::kRows);
  static_assert(kCluster == 1 || kCluster == 2, "a block of keys has two pieces to share");

  struct Params {
    SparsePrefillParams args;
    arch::TensorMap k_map, v_map;  // (64 dims, token, panel, kv_head, page)
    arch::TensorMap vertical_map;  // (64 dims, row, panel, q_head, K or V)
  };  // every box: 64 tokens or rows of one panel
  static Q1M_HOST_DEVICE int64_t num_blocks(const SparsePrefillParams& p) {
    return SparseTiles(p, kClusterRows).count * p.q.size(1) * kCluster;
  }
  using Ring = arch::Ring<Tile::kStages>;
  using Block = SparseBlock<kKeys>;

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    typename Tile::Smem tile;
    Block block[Tile::kStages];  // of the ring's places; free when the values are
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm90);
  using SharedSmem = arch::Shared<Smem>;

  // --- Produce -------------------------------------------------------------------------------
  /// A piece of keys or values to rows [64 index, 64 index + 64) of a block.
  static Q1M_DEVICE void load_piece(const Params& p, const PrefillTile& tile,
                                    const SparsePiece& piece, int index, int which,
                                    arch::Shared<uint16_t[kKeys * D]> to,
                                    arch::Shared<arch::Mbarrier> full) {
    const bool gathered = piece.page < 0;
    const arch::TensorMap& map = gathered ? p.vertical_map : which == 0 ? p.k_map : p.v_map;
    Q1M_UNROLL
    for (int panel = 0; panel < D / 64; ++panel) {
      const arch::Shared<void> at{to.address + static_cast<uint32_t>(panel) * Tile::kPanelBytes +
                                  static_cast<uint32_t>(index) * kPieceBytes};
      const arch::Coordinates5 from{{0, piece.row, panel, gathered ? tile.q_head : tile.kv_head,
                                     gathered ? which : piece.page}};
      if constexpr (kCluster == 1) {
        arch::tma_load(at, map, full, from);
      } else {
        arch::tma_load_multicast(at, map, full, from, kAllBlocks);
      }
    }
  }

  /// `tile`: the rows of the whole cluster.
  static Q1M_DEVICE void produce(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    arch::registers_decrease<Tile::kProducerRegisters>();
    if (arch::warp_index() != 0) return;
    const auto core = Q1M_SHARED_MEMBER(smem, tile);
    const auto k_full = Q1M_SHARED_MEMBER(core, k_full), v_full = Q1M_SHARED_MEMBER(core, v_full);
    const bool leader = arch::lane_index() == 0;
    const auto rank = static_cast<int>(arch::cluster_rank());
    Ring ring;
    SparseWalk walk(p.args, tile);
    for (bool first = true;; first = false) {
      // Consumers read of a block until they have used its values.
      ring.wait_free(Q1M_SHARED_MEMBER(core, k_free));
      ring.wait_free(Q1M_SHARED_MEMBER(core, v_free));
      const auto block = Q1M_SHARED_MEMBER(smem, block)[ring.stage];
      SparsePiece piece;
      int32_t last_key = 0, num_values = kKeys;
      bool more = true;
      Q1M_NO_UNROLL
      for (int index = 0; index < 2; ++index) {
        more = more && walk.next(piece, index == 0);  // a block is of one stage
        if (!more && index == 0) {
          if (!first) break;
          piece = walk.nothing();
        }
        write_piece(block, index, piece);
        if (more && piece.last_key > last_key) last_key = piece.last_key;
        if (num_values == kKeys && piece.num_rows < kPieceKeys) {
          num_values = index * kPieceKeys + piece.num_rows;
        }
        if (leader && (kCluster == 1 || index == rank)) {
          load_piece(p, tile, piece, index, 0, Q1M_SHARED_MEMBER(core, k)[ring.stage],
                     k_full[ring.stage]);
          load_piece(p, tile, piece, index, 1, Q1M_SHARED_MEMBER(core, v)[ring.stage],
                     v_full[ring.stage]);
        }
      }
      const bool over = walk.state.stage == kStages && !first;
      arch::warp_sync();
      if (leader) {  // only now may the phases end: the block's facts belong to the first one
        write_facts(block, last_key,
                    walk.state.stage == kStages && !over ? kStages - 1 : walk.state.stage,
                    num_values);
        if (over) {
          arch::mbarrier_arrive(k_full[ring.stage]);
        } else {
          arch::mbarrier_arrive_expect_tx(k_full[ring.stage], Tile::kBlockBytes);
          arch::mbarrier_arrive_expect_tx(v_full[ring.stage], Tile::kBlockBytes);
        }
      }
      if (over) return;
      ring.advance();
    }
  }

  // --- Consume -------------------------------------------------------------------------------
  /// The ring's blocks, as the consumers see them.
  struct Blocks {
    SharedSmem smem;
    int group;
    int place = 0;  // in the ring
    SparseFacts facts = {};
    static constexpr bool kEmptyRows = true;

    Q1M_DEVICE bool wait(const Ring& ring) {
      ring.wait_full(Q1M_SHARED_MEMBER(Q1M_SHARED_MEMBER(smem, tile), k_full));
      place = ring.stage;
      facts = read_facts(Q1M_SHARED_MEMBER(smem, block)[place]);
      return facts.stage < kStages;
    }
    Q1M_DEVICE void next() {}
    Q1M_DEVICE int stage() const { return facts.stage; }
    Q1M_DEVICE int num_values() const { return facts.num_values; }
    Q1M_DEVICE void mask(float (&s)[kKeys / 2], int first_token, int token) const {
      mask_scores<kKeys>(s, Q1M_SHARED_MEMBER(smem, block)[place], facts.last_key, group,
                         first_token, token);
    }
  };

  static Q1M_DEVICE void consume(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    const int group = (arch::warp_index() - 4) / 4;
    Tile::consume(p.args, tile, Q1M_SHARED_MEMBER(smem, tile),
                  arch::global_load(p.args.logit_scale.at(0)), Blocks{smem, group});
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void sync() {
    if constexpr (kCluster == 1) {
      arch::block_sync();
    } else {
      arch::cluster_arrive();
      arch::cluster_wait();
    }
  }

  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    const PrefillTile tile = find_tile(p.args, arch::block_index() / kCluster, kClusterRows);
    if (arch::thread_index() == 0) Tile::init(Q1M_SHARED_MEMBER(smem, tile));
    sync();
    if (arch::warp_index() < 4) {
      produce(p, tile, smem);
    } else if constexpr (kCluster == 1) {
      consume(p, tile, smem);
    } else {
      consume(p, tile_of_rank(tile, static_cast<int32_t>(arch::cluster_rank())), smem);
    }
    if constexpr (kCluster > 1) sync();  // the other block may still release places of this one
  }
};

}  // namespace qwen1m
