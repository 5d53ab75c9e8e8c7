#pragma once
/// prefill_attention on sm_80 and later without wgmma: bf16, head_dim 64 or 128.
///
/// A block is 128 threads and one tile: 128 query tokens of one head, 32 rows a warp
/// (common/attention/tile_sm80.cuh). Keys come in blocks of 64, the halves of a page, by cp.async;
/// while a block's scores are computed its values are on their way, and the next keys while its
/// values are used (FlashAttention-2, arXiv:2307.08691):
///
///   copies     K0 |      V0      |      K1        |      V1      | ...
///   products      |  S0 softmax0 |  O += P0 V0    |  S1 softmax1 | ...
///
/// A tile's keys, the three positions of its queries and the softmax are those of
/// prefill_attention_sm90.cuh. Shared memory: 64 KB at D = 128, two blocks on an A100's
/// multiprocessor, one on a consumer card's. Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "common/attention/tile_sm80.cuh"
#include "ops/prefill_attention/prefill_attention_mask.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"

namespace qwen1m {

template <int kHeadDim>
struct PrefillAttentionSm80 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  using Tile = AttentionTileSm80<D>;
  static constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  static constexpr int kWarpRows = Tile::kWarpRows, kHalves = Tile::kHalves;

  struct Params {
    PrefillAttentionParams args;
  };
  using Walk = KeyWalk<kKeys>;
  using Queries = typename Tile::Queries;
  using Keys = typename Tile::Keys;

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    alignas(1024) typename Queries::Storage q;  // rotated; at the end the output
    typename Keys::Storage k, v;
    PrefillTile tile;
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm80);
  using SharedSmem = arch::Shared<Smem>;

  // --- Produce -------------------------------------------------------------------------------
  static Q1M_DEVICE int32_t find_page(const Params& p, SharedSmem smem, const Walk& walk) {
    const int32_t batch =
        arch::shared_load(Q1M_SHARED_MEMBER(Q1M_SHARED_MEMBER(smem, tile), batch));
    return arch::global_load(p.args.block_table.at(batch, walk.page()));
  }

  /// Starts the copy of a block of keys or values. What lies behind the tile's last token becomes
  /// zero: it may be NaN, and 0 * NaN is NaN.
  static Q1M_DEVICE void load_block(const AnyView<4>& cache, const PrefillTile& tile,
                                    const Walk& walk, int32_t page, Keys to) {
    const bf16* from = cache.as<const bf16>().at(page, tile.kv_head,
                                                 walk.first_key() % static_cast<int>(kPageSize));
    Q1M_NO_UNROLL  // 8 addresses more in registers made the D = 128 kernel spill
        for (int i = arch::thread_index(); i < kKeys * (D / 8); i += kThreads) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      arch::cp_async_16(to.at(row, chunk).template as<void>(), from + i * 8,
                        walk.first_key() + row < walk.end);
    }
    arch::cp_async_commit();
  }

  // --- Consume -------------------------------------------------------------------------------
  static Q1M_DEVICE void attend(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    const Queries q{Q1M_SHARED_MEMBER(smem, q)};
    const Keys k{Q1M_SHARED_MEMBER(smem, k)}, v{Q1M_SHARED_MEMBER(smem, v)};
    const int warp = arch::warp_index(), lane = arch::lane_index();
    const int warp_row = warp * kWarpRows;
    const float scale_log2 = arch::global_load(p.args.logit_scale.at(tile.batch)) * 1.44269504f;
    float o[kHalves][D / 2], s[kHalves][kKeys / 2];
    uint32_t probabilities[kHalves][kKeys / 16][4];
    RowSoftmax softmax[kHalves];
    Q1M_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      Q1M_UNROLL
      for (int i = 0; i < D / 2; ++i) o[half][i] = 0;
    }

    Tile::put_aside(tile, Q1M_SHARED_MEMBER(smem, tile));
    Walk walk(p.args.dual_chunk, tile);
    int32_t page = find_page(p, smem, walk);
    load_block(p.args.k_cache, tile, walk, page, k);
    for (int stage = -1; !walk.done();) {
      if (walk.stage != stage) {  // between two block barriers, as all uses of the queries are
        stage = walk.stage;
        rotate_queries(p.args, Tile::whole(Q1M_SHARED_MEMBER(smem, tile)), stage, q, warp_row,
                       kWarpRows, lane, 32);
      }
      arch::cp_async_wait<0>();
      arch::block_sync();  // keys are here; the values of the block before are done with
      load_block(p.args.v_cache, tile, walk, page, v);
      Tile::multiply_qk(s, q, k, warp);
      Q1M_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const int token = tile.first_token + warp_row + half * 16;
        if (walk.hides_keys(token)) mask_scores<kKeys>(s[half], walk, token + lane / 4);
        softmax[half].template step<false>(s[half], scale_log2);
        softmax[half].rescale(o[half]);
        pack_probabilities<kKeys>(probabilities[half], s[half]);
      }
      walk.next();
      if (!walk.done()) page = find_page(p, smem, walk);
      arch::cp_async_wait<0>();
      arch::block_sync();  // values are here; the keys are done with
      if (!walk.done()) load_block(p.args.k_cache, tile, walk, page, k);
      Tile::multiply_pv(o, probabilities, v);
    }

    const PrefillTile all = Tile::whole(Q1M_SHARED_MEMBER(smem, tile));
    const float logit_scale = arch::global_load(p.args.logit_scale.at(all.batch));
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
    PrefillTile tile;
    if (find_tile(p.args, arch::block_index(), tile)) attend(p, tile, smem);
  }
};

}  // namespace qwen1m
