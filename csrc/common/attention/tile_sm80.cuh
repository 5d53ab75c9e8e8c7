#pragma once
/// Products and stores of attention on sm_80, shared by the dense and the sparse kernel: bf16,
/// head_dim 64 or 128, a tile of 128 query tokens of one head in 4 warps of 32 rows, so that each
/// key and value fragment read from shared memory serves two 16-row products. Keys come in blocks
/// of 64.

#include "arch/arch.h"
#include "common/attention/prefill_tile.h"
#include "common/attention/tile_rows.h"

namespace qwen1m {

template <int kHeadDim>
struct AttentionTileSm80 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kKeys = 64;
  static constexpr int kThreads = 128;
  static constexpr int kWarpRows = 32;
  static constexpr int kHalves = kWarpRows / 16;  // 16-row products of a warp
  static_assert(D == 64 || D == 128, "whole 128-byte panels");
  static_assert(kTileTokens == kThreads / 32 * kWarpRows);

  using Queries = RowTile<D>;
  using Keys = RowTile<D, kKeys>;

  // --- The tile ------------------------------------------------------------------------------
  /// What of the tile is needed at the borders of its key ranges and at the end only waits in
  /// shared memory: at D = 128 its registers would spill.
  static Q1M_DEVICE void put_aside(const PrefillTile& tile, arch::Shared<PrefillTile> to) {
    if (arch::thread_index() == 0) {
      arch::shared_store(Q1M_SHARED_MEMBER(to, batch), tile.batch);
      arch::shared_store(Q1M_SHARED_MEMBER(to, q_head), tile.q_head);
      arch::shared_store(Q1M_SHARED_MEMBER(to, kv_head), tile.kv_head);
      arch::shared_store(Q1M_SHARED_MEMBER(to, first_token), tile.first_token);
      arch::shared_store(Q1M_SHARED_MEMBER(to, num_tokens), tile.num_tokens);
      arch::shared_store(Q1M_SHARED_MEMBER(to, row), tile.row);
      arch::shared_store(Q1M_SHARED_MEMBER(to, first_row), tile.first_row);
    }
    arch::block_sync();
  }
  static Q1M_DEVICE PrefillTile whole(arch::Shared<PrefillTile> from) {
    return {.batch = arch::shared_load(Q1M_SHARED_MEMBER(from, batch)),
            .q_head = arch::shared_load(Q1M_SHARED_MEMBER(from, q_head)),
            .kv_head = arch::shared_load(Q1M_SHARED_MEMBER(from, kv_head)),
            .first_token = arch::shared_load(Q1M_SHARED_MEMBER(from, first_token)),
            .num_tokens = arch::shared_load(Q1M_SHARED_MEMBER(from, num_tokens)),
            .row = arch::shared_load(Q1M_SHARED_MEMBER(from, row)),
            .first_row = arch::shared_load(Q1M_SHARED_MEMBER(from, first_row))};
  }

  // --- Products ------------------------------------------------------------------------------
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

  // --- Store ---------------------------------------------------------------------------------
  /// From the accumulator layout to rows, through the query rows of this very warp.
  template <typename Params>
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
    store_rows<D>(p, tile, rows, first_row);
  }
};

}  // namespace qwen1m
