#pragma once
/// What sparse_prefill's GPU kernels find in their scratch: the keys and values of each head's
/// verticals, one after the other, and the order in which the heads are worked on.
///
/// A block is 128 threads and 64 rows of a head; the last block orders the heads. Bound: memory,
/// 8 D bytes a vertical. Rows behind a list's end, up to 64 of them, become zero: a piece of 64 is
/// multiplied as a whole. Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "ops/sparse_prefill/sparse_prefill_tiles.h"

namespace qwen1m {

struct SparseGather {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int kThreads = 128, kCluster = 1;
  static constexpr int kRows = kPieceKeys;
  static constexpr int kMaxHeads = 256;

  struct Params {
    SparsePrefillParams args;
  };
  /// Blocks to launch.
  static Q1M_HOST_DEVICE int64_t blocks_of_head(const SparsePrefillParams& p) {
    return (p.verticals.size(1) + kRows - 1) / kRows;
  }
  static Q1M_HOST_DEVICE int64_t num_blocks(const SparsePrefillParams& p) {
    return p.q.size(1) * blocks_of_head(p) + 1;
  }

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    int32_t keys[kMaxHeads];  // of the segment's last tile, by head
  };
  using SharedSmem = arch::Shared<Smem>;

  // --- Gather --------------------------------------------------------------------------------
  static Q1M_DEVICE void gather(const SparsePrefillParams& p, int64_t head, int64_t first_row) {
    const int64_t chunks = p.q.size(2) / 8, kv_head = head / (p.q.size(1) / p.k_cache.size(1));
    const int64_t list_end = p.verticals.size(1), tokens = p.q_begin + p.q.size(0);
    int64_t count = 0;
    for (int stage = 0; stage < kStages; ++stage) {
      count += arch::global_load(p.vertical_count.at(head, stage));
    }
    for (int64_t i = arch::thread_index(); i < kRows * chunks; i += kThreads) {
      const int64_t row = first_row + i / chunks, chunk = i % chunks;
      if (row >= list_end || row >= count + kRows) return;
      // A later token may not be in the cache yet; none of the call's rows attends to it.
      const int64_t key = row < count ? arch::global_load(p.verticals.at(head, row)) : tokens;
      const int64_t page =
          key < tokens ? arch::global_load(p.block_table.at(0, key / kPageSize)) : 0;
      Q1M_UNROLL
      for (int which = 0; which < 2; ++which) {
        const auto cache = (which == 0 ? p.k_cache : p.v_cache).as<const bf16>();
        arch::Vec16 value = {};
        if (key < tokens) {
          value = arch::global_load(reinterpret_cast<const arch::Vec16*>(
              cache.at(page, kv_head, key % kPageSize, chunk * 8)));
        }
        bf16* to = p.scratch.as<bf16>().at(which, head, row, chunk * 8);
        arch::global_store(reinterpret_cast<arch::Vec16*>(to), value);
      }
    }
  }

  // --- Order ---------------------------------------------------------------------------------
  /// Keys of the segment's last tile.
  static Q1M_DEVICE int32_t count_keys(const SparsePrefillParams& p, int64_t head) {
    const int64_t end = p.segment_end;
    const int64_t begin =
        p.segment_begin + (end - 1 - p.segment_begin) / p.tile_tokens * p.tile_tokens;
    const int64_t borders[kStages + 1] = {0, p.dual_chunk.successive_begin(begin),
                                          p.dual_chunk.intra_begin(begin), end};
    int32_t keys = 0;
    Q1M_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      if (arch::lane_index() == 0) keys += arch::global_load(p.vertical_count.at(head, stage));
      const int32_t runs = arch::global_load(p.run_count.at(head, stage));
      for (int32_t i = arch::lane_index(); i < runs; i += 32) {
        const int64_t lo = arch::global_load(p.runs.at(head, stage, i, 0));
        const int64_t hi = arch::global_load(p.runs.at(head, stage, i, 1));
        const int64_t from = begin - hi + 1, to = end - lo;
        const int64_t first = from < borders[stage] ? borders[stage] : from;
        const int64_t last = to < borders[stage + 1] ? to : borders[stage + 1];
        if (first < last) keys += static_cast<int32_t>(last - first);
      }
    }
    Q1M_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) keys += arch::shuffle_xor(keys, lanes);
    return keys;
  }

  static Q1M_DEVICE void order(const SparsePrefillParams& p, SharedSmem smem) {
    const auto keys = Q1M_SHARED_MEMBER(smem, keys);
    const auto heads = static_cast<int>(p.q.size(1));
    for (int head = arch::warp_index(); head < heads; head += kThreads / 32) {
      const int32_t count = count_keys(p, head);
      if (arch::lane_index() == 0) arch::shared_store(keys[head], count);
    }
    arch::block_sync();
    for (int head = arch::thread_index(); head < heads; head += kThreads) {
      const int32_t mine = arch::shared_load(keys[head]);
      int rank = 0;
      for (int other = 0; other < heads; ++other) {
        const int32_t count = arch::shared_load(keys[other]);
        rank += count > mine || (count == mine && other < head);
      }
      arch::global_store(head_of_rank(p, rank), int32_t{head});
    }
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    const int64_t block = arch::block_index(), per_head = blocks_of_head(p.args);
    if (block == arch::num_blocks() - 1) {
      order(p.args, arch::shared_memory<Smem>());
    } else {
      gather(p.args, block / per_head, block % per_head * kRows);
    }
  }
};

}  // namespace qwen1m
