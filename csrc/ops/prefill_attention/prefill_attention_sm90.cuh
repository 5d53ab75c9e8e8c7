#pragma once
/// prefill_attention on sm_90a: bf16, head_dim 64 or 128, Dual Chunk Attention in one online
/// softmax.
///
/// A block is 384 threads and one tile: 128 query tokens of one head. One producer thread loads
/// pages of keys and values, [128, D] each, from where they lie in the cache (one TMA load a page);
/// two consumer warpgroups hold 64 query rows each:
///
///   producer    K0 V0 | K1 V1 | K2 V2 ...              ring of kStages pages, K and V apart
///   consumer    S0 ; softmax0 ; [S1 | O += P0 V0] softmax1 ; [S2 | O += P1 V1] softmax2 ; ...
///
/// In brackets: two groups of wgmma in flight. The softmax of page n overlaps with P V of page n -
/// 1 in the same warpgroup, and with the products of the other warpgroup, whose turns two named
/// barriers order (FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2).
///
/// Keys come in ascending order, inter, successive and intra range (prefill_attention_tiles.h). The
/// query lies un-rotated in memory: at the start of a range each warpgroup rotates its 64 rows to
/// the range's position and writes them to shared memory, at most three times per tile.
///
/// Shared memory: 161 KB at D = 128, 145 KB at D = 64; registers 40 (producer), 232 (consumers).
/// Bound: tensor cores, 4 D flops per query and key. Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "arch/ring.h"
#include "ops/prefill_attention/prefill_attention_rows.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"

namespace qwen1m {

template <int kHeadDim>
struct PrefillAttentionSm90 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kRows = 64;  // query rows of a warpgroup, the M of wgmma
  static constexpr int kKeys = static_cast<int>(kPageSize);
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kThreads = 384;
  static constexpr int kConsumerThreads = 256;
  static constexpr uint32_t kPanelBytes = kKeys * 128;  // 64 dims: the width of the swizzle
  static constexpr uint32_t kPageBytes = kKeys * D * 2;
  static_assert(D == 64 || D == 128, "one or two swizzle panels; P V has N = D columns");
  static_assert(kTileTokens == 2 * kRows, "two consumer warpgroups");

  /// Named barriers: the turn of each warpgroup to start its products, and all consumers.
  static constexpr int kTurn0 = 1, kTurn1 = 2, kConsumers = 3;

  struct Params {
    PrefillAttentionParams args;
    arch::TensorMap k_map, v_map;  // (64 dims, token, panel, kv_head, page); the box is one page
  };
  using Walk = KeyWalk<kKeys>;

  // --- Smem ----------------------------------------------------------------------------------
  /// All tiles are panels of 128 rows of 64 dims with the 128-byte swizzle.
  struct Smem {
    alignas(1024) typename RowTile<D>::Storage q;  // rotated; at the end the output
    uint16_t k[kStages][kKeys * D];
    uint16_t v[kStages][kKeys * D];
    arch::Mbarrier k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytesSm90);
  using SharedSmem = arch::Shared<Smem>;

  // --- Init ----------------------------------------------------------------------------------
  static Q1M_DEVICE void init(SharedSmem smem) {
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    for (int i = 0; i < kStages; ++i) {
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, k_full)[i], 1);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, v_full)[i], 1);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, k_free)[i], kConsumerWarps);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, v_free)[i], kConsumerWarps);
    }
    arch::fence_mbarrier_init();
  }

  // --- Produce -------------------------------------------------------------------------------
  static Q1M_DEVICE void load_page(const arch::TensorMap& map, arch::Shared<uint16_t[kKeys * D]> to,
                                   arch::Shared<arch::Mbarrier> full, int kv_head, int page) {
    arch::mbarrier_arrive_expect_tx(full, kPageBytes);
    arch::tma_load(to.template as<void>(), map, full, {{0, 0, 0, kv_head, page}});
  }

  static Q1M_DEVICE void produce(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    arch::registers_decrease<40>();
    if (arch::warp_index() != 0 || !arch::elect_one()) return;
    arch::Ring<kStages> ring;
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
  static Q1M_DEVICE void take_turn(int group) {
    if (group == 0) {
      arch::named_barrier_sync<kTurn0>(kConsumerThreads);
    } else {
      arch::named_barrier_sync<kTurn1>(kConsumerThreads);
    }
  }
  static Q1M_DEVICE void pass_turn(int group) {
    if (group == 0) {
      arch::named_barrier_arrive<kTurn1>(kConsumerThreads);
    } else {
      arch::named_barrier_arrive<kTurn0>(kConsumerThreads);
    }
  }

  /// The warpgroup's 64 queries at the position of a stage. The scores of the stage before have
  /// been waited for, so nobody reads the old ones; take_turn is a barrier of the whole warpgroup
  /// and orders these writes before the products.
  static Q1M_DEVICE void load_queries(const Params& p, const PrefillTile& tile, SharedSmem smem,
                                      int stage, int group) {
    rotate_queries<D>(p.args, tile, stage, {Q1M_SHARED_MEMBER(smem, q)}, group * kRows, kRows,
                      arch::thread_index() % 128, 128);
    arch::fence_proxy_async();
  }

  /// s = q k^T of 64 rows and one page; a group of its own.
  static Q1M_DEVICE void multiply_qk(float (&s)[kKeys / 2], SharedSmem smem, int stage, int group) {
    const uint32_t q =
        Q1M_SHARED_MEMBER(smem, q).address + static_cast<uint32_t>(group) * kRows * 128;
    const uint32_t k = Q1M_SHARED_MEMBER(smem, k)[stage].address;
    arch::wgmma_fence(s);
    Q1M_UNROLL
    for (uint32_t step = 0; step < D / 16; ++step) {  // 16 dims are 32 bytes of a row
      const uint32_t offset = step / 4 * kPanelBytes + step % 4 * 32;
      arch::wgmma_ss<kKeys, arch::Major::kK, arch::Major::kK>(
          s, arch::matrix_descriptor(q + offset, 16, 1024, arch::Swizzle::k128),
          arch::matrix_descriptor(k + offset, 16, 1024, arch::Swizzle::k128), step > 0);
    }
    arch::wgmma_commit();
  }

  /// o += p v; a group of its own.
  static Q1M_DEVICE void multiply_pv(float (&o)[D / 2], uint32_t (&p)[kKeys / 16][4],
                                     SharedSmem smem, int stage) {
    const uint32_t v = Q1M_SHARED_MEMBER(smem, v)[stage].address;
    arch::wgmma_fence(o, p);
    Q1M_UNROLL
    for (uint32_t step = 0; step < kKeys / 16; ++step) {  // 16 keys are two 8-row groups
      arch::wgmma_rs<D, arch::Major::kMN>(
          o, p[step],
          arch::matrix_descriptor(v + step * 2048, kPanelBytes, 1024, arch::Swizzle::k128), true);
    }
    arch::wgmma_commit();
  }

  /// Values behind the sequence's last token may be NaN, and 0 * NaN is NaN: before a page that
  /// holds its end is multiplied, both warpgroups zero the rest of it. Nobody reads it before the
  /// barrier, which comes outside of the turns.
  static Q1M_DEVICE void zero_tail(SharedSmem smem, int stage, int first_row) {
    const RowTile<D> v{Q1M_SHARED_MEMBER(smem, v)[stage]};
    for (int i = arch::thread_index() - 128; i < (kKeys - first_row) * (D / 8);
         i += kConsumerThreads) {
      arch::shared_store(v.at(first_row + i / (D / 8), i % (D / 8)), arch::Vec16{});
    }
    arch::fence_proxy_async();
    arch::named_barrier_sync<kConsumers>(kConsumerThreads);
  }

  static Q1M_DEVICE void consume(const Params& p, const PrefillTile& tile, SharedSmem smem) {
    arch::registers_increase<232>();
    const int warp = arch::warp_index() - 4, group = warp / 4, lane = arch::lane_index();
    const int row = warp * 16 + lane / 4;  // of the tile; this thread has row + 8 too
    const int first_token = tile.first_token + group * kRows;  // of the warpgroup
    const float logit_scale = arch::global_load(p.args.logit_scale.at(tile.batch));
    const float scale_log2 = logit_scale * 1.44269504f;
    const int kv_len = static_cast<int>(arch::global_load(p.args.kv_len.at(tile.batch)));
    const auto k_full = Q1M_SHARED_MEMBER(smem, k_full), k_free = Q1M_SHARED_MEMBER(smem, k_free);
    const auto v_full = Q1M_SHARED_MEMBER(smem, v_full), v_free = Q1M_SHARED_MEMBER(smem, v_free);
    float o[D / 2], s[kKeys / 2];
    uint32_t probabilities[kKeys / 16][4];
    RowSoftmax softmax;
    Q1M_UNROLL
    for (int i = 0; i < D / 2; ++i) o[i] = 0;

    Walk walk(p.args.dual_chunk, tile);
    arch::Ring<kStages> k_ring, v_ring;
    if (group == 1) pass_turn(1);  // warpgroup 0 begins

    load_queries(p, tile, smem, walk.stage, group);
    k_ring.wait_full(k_full);
    take_turn(group);
    multiply_qk(s, smem, k_ring.stage, group);
    pass_turn(group);
    arch::wgmma_wait<0>(s);
    if (lane == 0) arch::mbarrier_arrive(k_free[k_ring.stage]);
    if (walk.hides_keys(first_token)) mask_scores<kKeys>(s, walk, tile.first_token + row);
    softmax.step(s, scale_log2);
    pack_probabilities<kKeys>(probabilities, s);

    for (;;) {
      const int stage = walk.stage;
      const int rows_left = kv_len - walk.first_key();  // of the page that waits for its P V
      walk.next();
      if (walk.done()) break;
      k_ring.advance();
      if (walk.stage != stage) load_queries(p, tile, smem, walk.stage, group);
      if (rows_left < kKeys) {  // a page with the end of the sequence and a border in front of it
        v_ring.wait_full(v_full);
        zero_tail(smem, v_ring.stage, rows_left);
      }
      k_ring.wait_full(k_full);
      take_turn(group);
      multiply_qk(s, smem, k_ring.stage, group);
      v_ring.wait_full(v_full);
      multiply_pv(o, probabilities, smem, v_ring.stage);
      pass_turn(group);
      arch::wgmma_wait<1>(s);
      if (lane == 0) arch::mbarrier_arrive(k_free[k_ring.stage]);
      if (walk.hides_keys(first_token)) mask_scores<kKeys>(s, walk, tile.first_token + row);
      softmax.step(s, scale_log2);
      arch::wgmma_wait<0>(o, probabilities);
      if (lane == 0) arch::mbarrier_arrive(v_free[v_ring.stage]);
      v_ring.advance();
      softmax.rescale(o);
      pack_probabilities<kKeys>(probabilities, s);
    }

    v_ring.wait_full(v_full);
    const int rows_left = kv_len - tile.last_token() / kKeys * kKeys;
    if (rows_left < kKeys) zero_tail(smem, v_ring.stage, rows_left);
    multiply_pv(o, probabilities, smem, v_ring.stage);
    if (group == 0) take_turn(0);  // the turn that warpgroup 1 passed on last
    arch::wgmma_wait<0>(o, probabilities);

    softmax.finish(p.args, tile, row, logit_scale, o);
    store(p, tile, {Q1M_SHARED_MEMBER(smem, q)}, warp * 16, o);
  }

  // --- Store ---------------------------------------------------------------------------------
  /// From the accumulator layout to rows, through the query rows of this very warp.
  static Q1M_DEVICE void store(const Params& p, const PrefillTile& tile, RowTile<D> rows,
                               int first_row, const float (&o)[D / 2]) {
    const int lane = arch::lane_index();
    Q1M_UNROLL
    for (int j = 0; j < D / 8; j += 2) {  // two groups of columns of 16 rows: four 8x8 matrices
      uint32_t r[4];
      Q1M_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = arch::pack_bf16(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
      arch::stmatrix_x4(rows.at(first_row + lane % 16, j + lane / 16), r[0], r[1], r[2], r[3]);
    }
    arch::warp_sync();
    store_rows<D>(p.args, tile, rows, first_row);
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const SharedSmem smem = arch::shared_memory<Smem>();
    PrefillTile tile;
    if (!find_tile(p.args, arch::block_index(), tile)) return;
    if (arch::thread_index() == 0) init(smem);
    arch::block_sync();
    if (arch::warp_index() < 4) {
      produce(p, tile, smem);
    } else {
      consume(p, tile, smem);
    }
  }
};

}  // namespace qwen1m
