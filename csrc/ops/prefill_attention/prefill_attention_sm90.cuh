#pragma once
/// prefill_attention on sm_90a: bf16, head_dim 64 or 128, Dual Chunk Attention in one online
/// softmax.
///
/// A block is 384 threads and one tile: 128 query tokens of one head. One producer thread loads
/// pages of keys and values, [128, D] each, from where they lie in the cache (one TMA load a page),
/// into a ring that two consumer warpgroups empty (common/attention/tile_sm90.cuh):
///
///   producer    K0 V0 | K1 V1 | K2 V2 ...              ring of kStages pages, K and V apart
///
/// Keys come in ascending order, inter, successive and intra range (prefill_attention_tiles.h), so
/// that the queries are rotated at most three times per tile.
///
/// Shared memory: 161 KB at D = 128, 145 KB at D = 64; registers 40 (producer), 232 (consumers).
/// Bound: tensor cores, 4 D flops per query and key. Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "arch/ring.h"
#include "common/attention/tile_sm90.cuh"
#include "ops/prefill_attention/prefill_attention_mask.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"

namespace qwen1m {

template <int kHeadDim>
struct PrefillAttentionSm90 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  using Tile = AttentionTileSm90<D, D == 64 ? 4 : 2>;
  static constexpr int kKeys = Tile::kKeys;
  static constexpr int kThreads = Tile::kThreads;

  struct Params {
    PrefillAttentionParams args;
    arch::TensorMap k_map, v_map;  // (64 dims, token, panel, kv_head, page); the box is one page
  };
  using Walk = KeyWalk<kKeys>;
  using Ring = arch::Ring<Tile::kStages>;

  // --- Smem ----------------------------------------------------------------------------------
  using Smem = typename Tile::Smem;
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm90);
  using SharedSmem = arch::Shared<Smem>;

  // --- Produce -------------------------------------------------------------------------------
  static Q1M_DEVICE void load_page(const arch::TensorMap& map, arch::Shared<uint16_t[kKeys * D]> to,
                                   arch::Shared<arch::Mbarrier> full, int kv_head, int page) {
    arch::mbarrier_arrive_expect_tx(full, Tile::kBlockBytes);
    arch::tma_load(to.template as<void>(), map, full, {{0, 0, 0, kv_head, page}});
  }

  static Q1M_DEVICE void produce(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    arch::registers_decrease<Tile::kProducerRegisters>();
    if (arch::warp_index() != 0 || !arch::elect_one()) return;
    Ring ring;
    Walk walk(p.args.dual_chunk, tile);
    int32_t page = arch::global_load(p.args.block_table.at(tile.batch, walk.page()));
    while (!walk.done()) {
      const int32_t current = page;
      walk.next();
      // Asked for one page ahead: the answer takes about as long as a page of products.
      if (!walk.done()) page = arch::global_load(p.args.block_table.at(tile.batch, walk.page()));
      ring.wait_free(Q1M_SHARED_MEMBER(smem, k_free));
      load_page(p.k_map, Q1M_SHARED_MEMBER(smem, k)[ring.stage],
                Q1M_SHARED_MEMBER(smem, k_full)[ring.stage], tile.kv_head, current);
      ring.wait_free(Q1M_SHARED_MEMBER(smem, v_free));
      load_page(p.v_map, Q1M_SHARED_MEMBER(smem, v)[ring.stage],
                Q1M_SHARED_MEMBER(smem, v_full)[ring.stage], tile.kv_head, current);
      ring.advance();
    }
  }

  // --- Consume -------------------------------------------------------------------------------
  /// The pages of the walk, as the consumers see them.
  struct Pages {
    Walk walk;
    arch::Shared<arch::Mbarrier[Tile::kStages]> k_full;
    int kv_len;
    static constexpr bool kEmptyRows = false;  // the first block holds key 0

    Q1M_DEVICE bool wait(const Ring& ring) const {
      if (walk.done()) return false;
      ring.wait_full(k_full);
      return true;
    }
    Q1M_DEVICE void next() { walk.next(); }
    Q1M_DEVICE int stage() const { return walk.stage; }
    Q1M_DEVICE int num_values() const { return kv_len - walk.first_key(); }
    Q1M_DEVICE void mask(float (&s)[kKeys / 2], int first_token, int token) const {
      if (walk.hides_keys(first_token)) mask_scores<kKeys>(s, walk, token);
    }
  };

  static Q1M_DEVICE void consume(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    const auto kv_len = static_cast<int>(arch::global_load(p.args.kv_len.at(tile.batch)));
    Tile::consume(p.args, tile, smem, arch::global_load(p.args.logit_scale.at(tile.batch)),
                  Pages{Walk(p.args.dual_chunk, tile), Q1M_SHARED_MEMBER(smem, k_full), kv_len});
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    PrefillTile tile;
    if (!find_tile(p.args, arch::block_index(), tile)) return;
    if (arch::thread_index() == 0) Tile::init(smem);
    arch::block_sync();
    if (arch::warp_index() < 4) {
      produce(p, tile, smem);
    } else {
      consume(p, tile, smem);
    }
  }
};

}  // namespace qwen1m
