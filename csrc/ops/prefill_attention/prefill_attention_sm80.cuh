#pragma once
/// prefill_attention on sm_80 and later without wgmma: bf16, head_dim 64 or 128.
///
/// A block is 128 threads and one tile: 128 query tokens of one head, 32 rows a warp, so that each
/// key and value fragment read from shared memory serves two 16-row products. Keys come in blocks
/// of 64, the halves of a page, by cp.async; while a block's scores are computed its values are on
/// their way, and the next keys while its values are used (FlashAttention-2, arXiv:2307.08691):
///
///   copies     K0 |      V0      |      K1        |      V1      | ...
///   products      |  S0 softmax0 |  O += P0 V0    |  S1 softmax1 | ...
///
/// A tile's keys, the three positions of its queries and the softmax are those of
/// prefill_attention_sm90.cuh. Shared memory: 64 KB at D = 128, two blocks on an A100's
/// multiprocessor, one on a consumer card's. Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "ops/prefill_attention/prefill_attention_rows.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"

namespace qwen1m {

template <int kHeadDim>
struct PrefillAttentionSm80 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kKeys = 64;
  static constexpr int kThreads = 128;
  static constexpr int kWarpRows = 32;
  static constexpr int kHalves = kWarpRows / 16;  // 16-row products of a warp
  static_assert(D == 64 || D == 128, "whole 128-byte panels");
  static_assert(kTileTokens == kThreads / 32 * kWarpRows);

  struct Params {
    PrefillAttentionParams args;
  };
  using Walk = KeyWalk<kKeys>;
  using Queries = RowTile<D>;
  using Keys = RowTile<D, kKeys>;

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
  /// What of the tile is needed at the borders of its key ranges and at the end only waits in
  /// shared memory: at D = 128 its registers would spill.
  static Q1M_DEVICE void put_aside(const PrefillTile& tile, SharedSmem smem) {
    const auto to = Q1M_SHARED_MEMBER(smem, tile);
    if (arch::thread_index() == 0) {
      arch::shared_store(Q1M_SHARED_MEMBER(to, batch), tile.batch);
      arch::shared_store(Q1M_SHARED_MEMBER(to, q_head), tile.q_head);
      arch::shared_store(Q1M_SHARED_MEMBER(to, num_tokens), tile.num_tokens);
      arch::shared_store(Q1M_SHARED_MEMBER(to, row), tile.row);
    }
    arch::block_sync();
  }
  static Q1M_DEVICE PrefillTile whole(PrefillTile tile, SharedSmem smem) {
    const auto from = Q1M_SHARED_MEMBER(smem, tile);
    tile.batch = arch::shared_load(Q1M_SHARED_MEMBER(from, batch));
    tile.q_head = arch::shared_load(Q1M_SHARED_MEMBER(from, q_head));
    tile.num_tokens = arch::shared_load(Q1M_SHARED_MEMBER(from, num_tokens));
    tile.row = arch::shared_load(Q1M_SHARED_MEMBER(from, row));
    return tile;
  }

  /// Four accumulators of one mma.sync among those of a thread.
  template <int kCount>
  static Q1M_DEVICE float (&quad(float (&x)[kCount], int group))[4] {
    return reinterpret_cast<float (&)[4]>(x[4 * group]);
  }

  /// s = q k^T of the warp's 32 rows and one block.
  static Q1M_DEVICE void multiply_qk(float (&s)[kHalves][kKeys / 2], Queries q, Keys k, int warp) {
    const int lane = arch::opaque(arch::lane_index());
    Q1M_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      Q1M_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) s[half][i] = 0;
    }
    Q1M_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[kHalves][4];
      Q1M_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        arch::ldmatrix_x4(a[half],
                          q.at(warp * kWarpRows + half * 16 + lane % 16, 2 * step + lane / 16));
      }
      Q1M_UNROLL
      for (int j = 0; j < kKeys / 8; j += 2) {  // two groups of 8 keys
        uint32_t r[4];
        arch::ldmatrix_x4(r, k.at(8 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        Q1M_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          arch::mma_m16n8k16(quad(s[half], j), a[half], {r[0], r[1]});
          arch::mma_m16n8k16(quad(s[half], j + 1), a[half], {r[2], r[3]});
        }
      }
    }
  }

  /// o += p v.
  static Q1M_DEVICE void multiply_pv(float (&o)[kHalves][D / 2],
                                     const uint32_t (&p)[kHalves][kKeys / 16][4], Keys v) {
    const int lane = arch::opaque(arch::lane_index());
    Q1M_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      Q1M_UNROLL
      for (int j = 0; j < D / 8; j += 2) {  // two groups of 8 dims
        uint32_t r[4];
        arch::ldmatrix_x4_transposed(r, v.at(step * 16 + lane % 16, j + lane / 16));
        Q1M_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          arch::mma_m16n8k16(quad(o[half], j), p[half][step], {r[0], r[1]});
          arch::mma_m16n8k16(quad(o[half], j + 1), p[half][step], {r[2], r[3]});
        }
      }
    }
  }

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

    put_aside(tile, smem);
    Walk walk(p.args.dual_chunk, tile);
    int32_t page = find_page(p, smem, walk);
    load_block(p.args.k_cache, tile, walk, page, k);
    for (int stage = -1; !walk.done();) {
      if (walk.stage != stage) {  // between two block barriers, as all uses of the queries are
        stage = walk.stage;
        rotate_queries<D>(p.args, whole(tile, smem), stage, q, warp_row, kWarpRows, lane, 32);
      }
      arch::cp_async_wait<0>();
      arch::block_sync();  // keys are here; the values of the block before are done with
      load_block(p.args.v_cache, tile, walk, page, v);
      multiply_qk(s, q, k, warp);
      Q1M_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const int token = tile.first_token + warp_row + half * 16;
        if (walk.hides_keys(token)) mask_scores<kKeys>(s[half], walk, token + lane / 4);
        softmax[half].step(s[half], scale_log2);
        softmax[half].rescale(o[half]);
        pack_probabilities<kKeys>(probabilities[half], s[half]);
      }
      walk.next();
      if (!walk.done()) page = find_page(p, smem, walk);
      arch::cp_async_wait<0>();
      arch::block_sync();  // values are here; the keys are done with
      if (!walk.done()) load_block(p.args.k_cache, tile, walk, page, k);
      multiply_pv(o, probabilities, v);
    }

    const PrefillTile all = whole(tile, smem);
    const float logit_scale = arch::global_load(p.args.logit_scale.at(all.batch));
    Q1M_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      const int first_row = warp_row + half * 16;
      softmax[half].finish(p.args, all, first_row + lane / 4, logit_scale, o[half]);
      store(p, all, q, first_row, o[half]);
    }
  }

  // --- Store ---------------------------------------------------------------------------------
  /// From the accumulator layout to rows, through the query rows of this very warp.
  static Q1M_DEVICE void store(const Params& p, const PrefillTile& tile, Queries rows,
                               int first_row, const float (&o)[D / 2]) {
    const int lane = arch::opaque(arch::lane_index());
    arch::warp_sync();
    Q1M_UNROLL
    for (int j = 0; j < D / 8; ++j) {
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        const uint32_t to = rows.at(first_row + lane / 4 + 8 * h, j).address + lane % 4 * 4;
        arch::shared_store(arch::Shared<uint32_t>{to},
                           arch::pack_bf16(o[4 * j + 2 * h], o[4 * j + 2 * h + 1]));
      }
    }
    arch::warp_sync();
    store_rows<D>(p.args, tile, rows, first_row);
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    PrefillTile tile;
    if (find_tile(p.args, arch::block_index(), tile)) attend(p, tile, smem);
  }
};

}  // namespace qwen1m
