#pragma once
/// What becomes of partial results: those of a block's warps become the block's, those of a
/// sequence's splits its output. A partial result is o, m, l of each row: m the maximum of the raw
/// scores (-inf: no key), l = sum exp(scale (s - m)), o = sum exp(scale (s - m)) v.

#include <cmath>

#include "arch/arch.h"
#include "common/attention/tile_rows.h"
#include "ops/decode_attention/decode_attention_splits.h"
#include "qwen1m/decode_attention.h"

namespace qwen1m {

inline constexpr int kDecodeWarps = 4;

/// What a launch hands to its blocks.
struct DecodeLaunch {
  DecodeAttentionParams args;
  int32_t wanted_splits;  // of a long sequence
  int32_t max_splits;     // blocks per (sequence, KV head, row block)
  int32_t rows;           // of a block: 16 or 32
  int32_t row_blocks;     // blocks that share the keys of a split
  uint32_t* counters;     // [batch, kv_heads, row_blocks] splits that are done; zero between calls
  float* partials;        // [batch, kv_heads, row_blocks, max_splits][kRows (D + 2)]

  int64_t num_blocks() const {
    return args.kv_len.size(0) * args.k_cache.size(1) * max_splits * row_blocks;
  }
};

/// One block's work: rows (query token, query head of the group), token-major, and keys.
struct DecodeWork {
  int32_t batch, kv_head, group;
  int32_t first_row, num_rows;  // of the KV head's q_tokens * group rows
  int32_t first_token;          // absolute, of query token 0
  int32_t kv_len;
  int32_t split, num_splits;
  KeyRange keys;
  int32_t sequence;  // index of (batch, KV head, row block)

  Q1M_DEVICE int32_t q_token(int row) const { return (first_row + row) / group; }
  Q1M_DEVICE int32_t q_head(int row) const { return kv_head * group + (first_row + row) % group; }
  Q1M_DEVICE int32_t token(int row) const { return first_token + q_token(row); }
};

/// The work of block `block`; false if there is none. Blocks that share keys are neighbours.
template <int kRows>
Q1M_DEVICE bool find_work(const DecodeLaunch& launch, int64_t block, DecodeWork& work) {
  const DecodeAttentionParams& p = launch.args;
  const auto kv_heads = static_cast<int32_t>(p.k_cache.size(1));
  const auto q_tokens = static_cast<int32_t>(p.q.size(1));
  int64_t rest = block;
  const auto row_block = static_cast<int32_t>(rest % launch.row_blocks);
  rest /= launch.row_blocks;
  work.split = static_cast<int32_t>(rest % launch.max_splits);
  rest /= launch.max_splits;
  work.kv_head = static_cast<int32_t>(rest % kv_heads);
  work.batch = static_cast<int32_t>(rest / kv_heads);
  work.sequence = static_cast<int32_t>(rest * launch.row_blocks) + row_block;
  work.group = static_cast<int32_t>(p.q.size(2)) / kv_heads;
  work.first_row = row_block * kRows;
  const int32_t rows_left = q_tokens * work.group - work.first_row;
  work.num_rows = rows_left < kRows ? rows_left : kRows;
  work.kv_len = static_cast<int32_t>(arch::global_load(p.kv_len.at(work.batch)));
  work.first_token = work.kv_len - q_tokens;
  if (work.kv_len == 0) return work.split == 0;
  const SequenceSplits splits(p.dual_chunk, work.kv_len, q_tokens, launch.wanted_splits);
  work.num_splits = splits.count;
  if (work.split >= splits.count) return false;
  work.keys = splits.at(work.split);
  return true;
}

/// Neighbouring floats of a lane.
template <int kCount>
struct alignas(4 * kCount) Floats {
  float x[kCount];
};

/// exp2(scale (m - maximum)), 0 for a row that has seen no key.
Q1M_DEVICE float merge_weight(float m, float maximum, float scale_log2) {
  return m == -INFINITY ? 0.0f : arch::exp2_approx((m - maximum) * scale_log2);
}

/// kFp8: the accumulators hold even and odd dims apart (decode_attention_fp8.h), and values have a
/// scale.
template <int kHeadDim, int kRows, bool kFp8>
struct DecodeMerge {
  static constexpr int D = kHeadDim;
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kLaneDims = D / 32;  // of a row, when a warp holds it
  static constexpr int kPitch = D + 8;      // floats: 8 rows of a column lie in distinct banks
  static constexpr int kUnroll = 8;         // partial results on their way at a time
  static constexpr int64_t kPartialFloats = kRows * (D + 2);  // o [kRows][D], m, l [kRows]
  using Lane = Floats<kLaneDims>;

  struct Smem {
    float m[kDecodeWarps][kRows], l[kDecodeWarps][kRows];
    alignas(16) float o[kDecodeWarps][16][kPitch];  // of one tile of 16 rows
    float weight[kDecodeWarps][kMaxSplits + kUnroll];
    uint32_t splits_before;
  };
  using SharedSmem = arch::Shared<Smem>;

  // --- A row ---------------------------------------------------------------------------------
  /// What turns its products <q, k> into log2 units. Rows behind the last, whose queries are zero,
  /// have the last one's.
  static Q1M_DEVICE float scale_log2(const DecodeAttentionParams& p, const DecodeWork& work,
                                     int row) {
    const int q_token = work.q_token(row < work.num_rows ? row : work.num_rows - 1);
    float scale = arch::global_load(p.logit_scale.at(work.batch, q_token)) * 1.44269504f;
    if constexpr (kFp8) scale *= arch::global_load(p.k_scale.at(work.kv_head));
    return scale;
  }

  /// The lane's dims of a row, from the sum of exponentials and that of the weighted values.
  static Q1M_DEVICE void store_row(const DecodeAttentionParams& p, const DecodeWork& work, int row,
                                   float m, float l, const Lane& o, float scale) {
    constexpr float kLn2 = 0.69314718f;
    const int lane = arch::lane_index();
    float norm = l == 0 ? 0.0f : arch::reciprocal_approx(l);
    if constexpr (kFp8) norm *= arch::global_load(p.v_scale.at(work.kv_head));
    uint32_t pairs[kLaneDims / 2];
    Q1M_UNROLL
    for (int i = 0; i < kLaneDims / 2; ++i) {
      pairs[i] = arch::pack_bf16(o.x[2 * i] * norm, o.x[2 * i + 1] * norm);
    }
    const int q_token = work.q_token(row), q_head = work.q_head(row);
    bf16* to = p.out.as<bf16>().at(work.batch, q_token, q_head, lane * kLaneDims);
    Q1M_UNROLL
    for (int i = 0; i < kLaneDims / 2; ++i) {
      arch::global_store(reinterpret_cast<uint32_t*>(to) + i, pairs[i]);
    }
    if (p.lse && lane == 0) {
      arch::global_store(p.lse.at(work.batch, q_token, q_head),
                         l == 0 ? -INFINITY : (m * scale + arch::log2_approx(l)) * kLn2);
    }
  }

  /// A sequence without keys.
  static Q1M_DEVICE void store_empty(const DecodeAttentionParams& p, const DecodeWork& work) {
    for (int row = arch::warp_index(); row < work.num_rows; row += kDecodeWarps) {
      store_row(p, work, row, -INFINITY, 0, Lane{}, 1);
    }
  }

  // --- The warps of a block ------------------------------------------------------------------
  /// Ends a block's work: merges its warps' results, and the splits' if this is the last one.
  template <int kRowTiles>
  static Q1M_DEVICE void finish(const DecodeLaunch& launch, const DecodeWork& work, SharedSmem smem,
                                RowSoftmax (&softmax)[kRowTiles], float (&o)[kRowTiles][D / 2],
                                const float (&scales)[kRowTiles][2]) {
    const int warp = arch::warp_index(), lane = arch::lane_index();
    const auto all_m = Q1M_SHARED_MEMBER(smem, m), all_l = Q1M_SHARED_MEMBER(smem, l);
    const auto all_o = Q1M_SHARED_MEMBER(smem, o);
    arch::block_sync();  // the stages are done with
    Q1M_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * tile + lane / 4 + 8 * h;
        float sum = softmax[tile].l[h];
        sum += arch::shuffle_xor(sum, 1);
        sum += arch::shuffle_xor(sum, 2);
        if (lane % 4 == 0) {
          arch::shared_store(all_m[warp][row], softmax[tile].m[h]);
          arch::shared_store(all_l[warp][row], sum);
        }
      }
    }
    arch::block_sync();
    Q1M_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * h;
        const float weight =
            merge_weight(softmax[tile].m[h], maximum_of(all_m, 16 * tile + row), scales[tile][h]);
        Q1M_UNROLL
        for (int j = 0; j < D / 8; j += 2) {
          const float* x = o[tile] + 4 * j + 2 * h;
          if constexpr (kFp8) {
            arch::shared_store(
                all_o[warp][row][8 * j + 4 * (lane % 4)].template as<Floats<4>>(),
                Floats<4>{{x[0] * weight, x[4] * weight, x[1] * weight, x[5] * weight}});
          } else {
            Q1M_UNROLL
            for (int i = 0; i < 2; ++i) {
              arch::shared_store(
                  all_o[warp][row][8 * (j + i) + 2 * (lane % 4)].template as<Floats<2>>(),
                  Floats<2>{{x[4 * i] * weight, x[4 * i + 1] * weight}});
            }
          }
        }
      }
      arch::block_sync();
      for (int row = warp; row < 16 && 16 * tile + row < work.num_rows; row += kDecodeWarps) {
        merge_warps(launch, work, smem, 16 * tile, row);
      }
      if (tile + 1 < kRowTiles) arch::block_sync();  // before the next tile overwrites it
    }
    if (work.num_splits > 1) merge_splits(launch, work, smem);
  }

  static Q1M_DEVICE float maximum_of(arch::Shared<float[kDecodeWarps][kRows]> m, int row) {
    float maximum = arch::shared_load(m[0][row]);
    Q1M_UNROLL
    for (int w = 1; w < kDecodeWarps; ++w) maximum = fmaxf(maximum, arch::shared_load(m[w][row]));
    return maximum;
  }

  /// One row, by one warp: to the output if the block saw all keys, else to the partial results.
  static Q1M_DEVICE void merge_warps(const DecodeLaunch& launch, const DecodeWork& work,
                                     SharedSmem smem, int first_row, int row) {
    const auto all_m = Q1M_SHARED_MEMBER(smem, m), all_l = Q1M_SHARED_MEMBER(smem, l);
    const auto all_o = Q1M_SHARED_MEMBER(smem, o);
    const int lane = arch::lane_index(), block_row = first_row + row;
    const float scale = scale_log2(launch.args, work, block_row);
    const float m = maximum_of(all_m, block_row);
    float l = 0;
    Lane o = {};
    Q1M_UNROLL
    for (int w = 0; w < kDecodeWarps; ++w) {
      l += arch::shared_load(all_l[w][block_row]) *
           merge_weight(arch::shared_load(all_m[w][block_row]), m, scale);
      const Lane part = arch::shared_load(all_o[w][row][lane * kLaneDims].template as<Lane>());
      Q1M_UNROLL
      for (int i = 0; i < kLaneDims; ++i) o.x[i] += part.x[i];
    }
    if (work.num_splits == 1) {
      store_row(launch.args, work, block_row, m, l, o, scale);
      return;
    }
    float* to = partial(launch, work, work.split);
    arch::global_store(reinterpret_cast<Lane*>(to + block_row * D + lane * kLaneDims), o);
    if (lane == 0) {
      arch::global_store(to + kRows * D + block_row, m);
      arch::global_store(to + kRows * (D + 1) + block_row, l);
    }
  }

  // --- The splits of a sequence --------------------------------------------------------------
  static Q1M_DEVICE float* partial(const DecodeLaunch& launch, const DecodeWork& work, int split) {
    return launch.partials + (int64_t{work.sequence} * launch.max_splits + split) * kPartialFloats;
  }

  /// The block that comes last finds all partial results, merges them and resets the counter.
  static Q1M_DEVICE void merge_splits(const DecodeLaunch& launch, const DecodeWork& work,
                                      SharedSmem smem) {
    const auto splits_before = Q1M_SHARED_MEMBER(smem, splits_before);
    uint32_t* counter = launch.counters + work.sequence;
    arch::block_sync();  // all warps have written
    if (arch::thread_index() == 0) {
      arch::fence_device();
      const uint32_t before = arch::atomic_add(counter, 1);
      arch::shared_store(splits_before, before);
      if (before + 1 == static_cast<uint32_t>(work.num_splits)) arch::global_store(counter, 0u);
    }
    arch::block_sync();
    if (arch::shared_load(splits_before) + 1 != static_cast<uint32_t>(work.num_splits)) return;
    for (int row = arch::warp_index(); row < work.num_rows; row += kDecodeWarps) {
      merge_row(launch, work, Q1M_SHARED_MEMBER(smem, weight)[arch::warp_index()], row);
    }
  }

  /// One row, by one warp: weights first, a lane for every 32nd split, then the weighted sum of the
  /// splits in ascending order, a few dims a lane.
  static Q1M_DEVICE void merge_row(const DecodeLaunch& launch, const DecodeWork& work,
                                   arch::Shared<float[kMaxSplits + kUnroll]> weights, int row) {
    const int lane = arch::lane_index(), count = work.num_splits;
    const float scale = scale_log2(launch.args, work, row);
    const float* first = partial(launch, work, 0);
    const float* all_m = first + kRows * D + row;
    float maximum = -INFINITY;
    for (int i = lane; i < count; i += 32) {
      maximum = fmaxf(maximum, arch::global_load_coherent(all_m + i * kPartialFloats));
    }
    Q1M_UNROLL
    for (int step = 16; step > 0; step /= 2) {
      maximum = fmaxf(maximum, arch::shuffle_xor(maximum, step));
    }
    float l = 0;
    for (int i = lane; i < count + kUnroll; i += 32) {  // weight 0 behind the last split
      float weight = 0;
      if (i < count) {
        const float* m = all_m + i * kPartialFloats;
        weight = merge_weight(arch::global_load_coherent(m), maximum, scale);
        l += weight * arch::global_load_coherent(m + kRows);
      }
      arch::shared_store(weights[i], weight);
    }
    Q1M_UNROLL
    for (int step = 16; step > 0; step /= 2) l += arch::shuffle_xor(l, step);
    arch::warp_sync();

    Lane o = {};
    const float* from = first + row * D + lane * kLaneDims;
    for (int i = 0; i < count; i += kUnroll) {
      Lane part[kUnroll];
      Q1M_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        const int split = i + u < count ? i + u : count - 1;
        part[u] = arch::global_load_coherent(
            reinterpret_cast<const Lane*>(from + split * kPartialFloats));
      }
      Q1M_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = arch::shared_load(weights[i + u]);
        Q1M_UNROLL
        for (int d = 0; d < kLaneDims; ++d) o.x[d] += weight * part[u].x[d];
      }
    }
    arch::warp_sync();  // before the next row's weights
    store_row(launch.args, work, row, maximum, l, o, scale);
  }
};

}  // namespace qwen1m
