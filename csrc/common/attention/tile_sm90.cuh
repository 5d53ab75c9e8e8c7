#pragma once
/// The consumers of attention on sm_90a, shared by the dense and the sparse kernel: bf16, head_dim
/// 64 or 128, a tile of 128 query tokens of one head, keys in blocks of 128.
///
/// Two warpgroups hold 64 query rows each; a producer (the kernel's own) fills a ring of kStages
/// blocks of keys and one of values:
///
///   consumer    S0 ; softmax0 ; [S1 | O += P0 V0] softmax1 ; [S2 | O += P1 V1] softmax2 ; ...
///
/// In brackets: two groups of wgmma in flight. The softmax of block n overlaps with P V of block n
/// - 1 in the same warpgroup, and with the products of the other warpgroup, whose turns two named
/// barriers order (FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2).
///
/// The query lies un-rotated in memory: where blocks of another DCA range begin, each warpgroup
/// rotates its 64 rows to the range's position and writes them to shared memory.

#include "arch/arch.h"
#include "arch/ring.h"
#include "common/attention/prefill_tile.h"
#include "common/attention/tile_rows.h"

namespace qwen1m {

template <int kHeadDim, int kRingStages, int kRegistersOfProducer = 40, int kBlocksOfCluster = 1>
struct AttentionTileSm90 {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr int kRows = 64;  // query rows of a warpgroup, the M of wgmma
  static constexpr int kKeys = static_cast<int>(kPageSize);
  static constexpr int kStages = kRingStages;
  /// Blocks whose producers fill each other's rings: a place is free when all of them are done.
  static constexpr int kCluster = kBlocksOfCluster;
  static constexpr int kThreads = 384;
  static constexpr int kConsumerThreads = 256;
  /// Of a thread. A block of 384 is launched with 168 each.
  static constexpr int kProducerRegisters = kRegistersOfProducer;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static constexpr uint32_t kPanelBytes = kKeys * 128;  // 64 dims: the width of the swizzle
  static constexpr uint32_t kBlockBytes = kKeys * D * 2;
  static_assert(D == 64 || D == 128, "one or two swizzle panels; P V has N = D columns");
  static_assert(kTileTokens == 2 * kRows, "two consumer warpgroups");

  /// Named barriers: the turn of each warpgroup to start its products, and all consumers.
  static constexpr int kTurn0 = 1, kTurn1 = 2, kConsumers = 3;

  // --- Smem ----------------------------------------------------------------------------------
  /// All tiles are panels of 128 rows of 64 dims with the 128-byte swizzle.
  struct Smem {
    alignas(1024) typename RowTile<D>::Storage q;  // rotated; at the end the output
    uint16_t k[kStages][kKeys * D];
    uint16_t v[kStages][kKeys * D];
    arch::Mbarrier k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };
  using SharedSmem = arch::Shared<Smem>;

  // --- Init ----------------------------------------------------------------------------------
  static Q1M_DEVICE void init(SharedSmem smem) {
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    for (int i = 0; i < kStages; ++i) {
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, k_full)[i], 1);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, v_full)[i], 1);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, k_free)[i], kConsumerWarps * kCluster);
      arch::mbarrier_init(Q1M_SHARED_MEMBER(smem, v_free)[i], kConsumerWarps * kCluster);
    }
    arch::fence_mbarrier_init();
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

  /// Says to every producer that this warp is done with a place of the ring.
  static Q1M_DEVICE void release(arch::Shared<arch::Mbarrier> free) {
    const int lane = arch::lane_index();
    if constexpr (kCluster == 1) {
      if (lane == 0) arch::mbarrier_arrive(free);
    } else {
      if (lane < kCluster) {
        arch::mbarrier_arrive_remote(arch::map_to_rank(free, static_cast<uint32_t>(lane)));
      }
    }
  }

  /// The warpgroup's 64 queries at the position of a stage. The scores of the stage before have
  /// been waited for, so nobody reads the old ones; take_turn is a barrier of the whole warpgroup
  /// and orders these writes before the products.
  template <typename Params>
  static Q1M_DEVICE void load_queries(const Params& p, const PrefillTile& tile, SharedSmem smem,
                                      int stage, int group) {
    rotate_queries(p, tile, stage, RowTile<D>{Q1M_SHARED_MEMBER(smem, q)}, group * kRows, kRows,
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

  /// Values behind the sequence's last token may be NaN, and 0 * NaN is NaN: before a block that
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

  /// All products and the softmax of a tile, and its results. `Params` are those of an op: q,
  /// rope_table, dual_chunk, out, lse. `Keys` says what the producer's blocks are:
  ///   bool wait(const arch::Ring<kStages>&)   until the keys of this block are here; false: there
  ///                                           is none, the last one was the last
  ///   void next()                             to the next block
  ///   int stage()                             position of the queries, as query_position has it
  ///   int num_values()                        rows of the values that are numbers
  ///   void mask(float (&s)[kKeys / 2], int first_token, int token)
  ///                                           hides what a thread's rows, `token` and 8 later, may
  ///                                           not see; first_token: of the warpgroup
  ///   kEmptyRows                              whether a row may have no key in the blocks so far
  /// There is at least one block.
  template <typename Params, typename Keys>
  static Q1M_DEVICE void consume(const Params& p, const PrefillTile& tile, SharedSmem smem,
                                 float logit_scale, Keys keys) {
    arch::registers_increase<kConsumerRegisters>();
    const int warp = arch::warp_index() - 4, group = warp / 4, lane = arch::lane_index();
    const int row = warp * 16 + lane / 4;  // of the tile; this thread has row + 8 too
    const int first_token = tile.first_token + group * kRows;  // of the warpgroup
    const float scale_log2 = logit_scale * 1.44269504f;
    const auto k_free = Q1M_SHARED_MEMBER(smem, k_free);
    const auto v_full = Q1M_SHARED_MEMBER(smem, v_full), v_free = Q1M_SHARED_MEMBER(smem, v_free);
    float o[D / 2], s[kKeys / 2];
    uint32_t probabilities[kKeys / 16][4];
    RowSoftmax softmax;
    Q1M_UNROLL
    for (int i = 0; i < D / 2; ++i) o[i] = 0;

    arch::Ring<kStages> k_ring, v_ring;
    if (group == 1) pass_turn(1);  // warpgroup 0 begins

    keys.wait(k_ring);
    load_queries(p, tile, smem, keys.stage(), group);
    take_turn(group);
    multiply_qk(s, smem, k_ring.stage, group);
    pass_turn(group);
    arch::wgmma_wait<0>(s);
    release(k_free[k_ring.stage]);
    keys.mask(s, first_token, tile.first_token + row);
    softmax.template step<Keys::kEmptyRows>(s, scale_log2);
    pack_probabilities<kKeys>(probabilities, s);

    int num_values;  // of the block that waits for its P V
    for (;;) {
      const int stage = keys.stage();
      num_values = keys.num_values();
      keys.next();
      k_ring.advance();
      if (!keys.wait(k_ring)) break;
      if (keys.stage() != stage) load_queries(p, tile, smem, keys.stage(), group);
      if (num_values < kKeys) {  // the sequence's end, with a border or other keys behind it
        v_ring.wait_full(v_full);
        zero_tail(smem, v_ring.stage, num_values);
      }
      take_turn(group);
      multiply_qk(s, smem, k_ring.stage, group);
      v_ring.wait_full(v_full);
      multiply_pv(o, probabilities, smem, v_ring.stage);
      pass_turn(group);
      arch::wgmma_wait<1>(s);
      release(k_free[k_ring.stage]);
      keys.mask(s, first_token, tile.first_token + row);
      softmax.template step<Keys::kEmptyRows>(s, scale_log2);
      arch::wgmma_wait<0>(o, probabilities);
      release(v_free[v_ring.stage]);
      v_ring.advance();
      softmax.rescale(o);
      pack_probabilities<kKeys>(probabilities, s);
    }

    v_ring.wait_full(v_full);
    if (num_values < kKeys) zero_tail(smem, v_ring.stage, num_values);
    multiply_pv(o, probabilities, smem, v_ring.stage);
    if (group == 0) take_turn(0);  // the turn that warpgroup 1 passed on last
    arch::wgmma_wait<0>(o, probabilities);

    softmax.finish(p, tile, row, logit_scale, o);
    store(p, tile, {Q1M_SHARED_MEMBER(smem, q)}, warp * 16, o);
  }

  // --- Store ---------------------------------------------------------------------------------
  /// From the accumulator layout to rows, through the query rows of this very warp.
  template <typename Params>
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
    store_rows<D>(p, tile, rows, first_row);
  }
};

}  // namespace qwen1m
