#pragma once
/// decode_attention on a GPU: bf16, head_dim 64 or 128, and an fp8 cache. The kernels of both
/// architectures are this one with another ring of copies (decode_attention_sm80.cuh,
/// decode_attention_sm90.cuh).
///
/// A block is 4 warps and one split of a sequence's keys for one KV head. Its rows are the group of
/// query heads times the query tokens, 16 to a product (mma.sync m16n8k16): decoding reads each key
/// once for a handful of rows and is bound by that, so that the padding of 7 rows to 16 costs
/// nothing and the 64 rows of a wgmma would.
///
/// The warps share the queries and nothing else. Warp w takes steps w, w + 4, ... of the split, a
/// step being 4 KB of keys and as much of values, from a ring of its own that it fills itself: no
/// barrier of the block stands in the loop, and all memory that is not being used right now is on
/// its way:
///
///   ring       [ step i: products | step i+4: landing | step i+8: landing ]
///
/// At the end the four partial softmaxes become one, and the last block of a sequence's head merges
/// those of all splits (Flash-Decoding; decode_attention_merge.h).
///
/// Compiled and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "common/attention/tile_rows.h"
#include "ops/decode_attention/decode_attention_fp8.h"
#include "ops/decode_attention/decode_attention_merge.h"
#include "ops/decode_attention/decode_attention_splits.h"
#include "qwen1m/decode_attention.h"

namespace qwen1m {

/// Keys of a step: 4 KB.
template <int kHeadDim>
inline constexpr int kStepKeys = 2048 / kHeadDim;

/// One step in a warp's ring.
template <int kHeadDim>
struct DecodeStage {
  using Rows = RowTile<kHeadDim, kStepKeys<kHeadDim>>;
  alignas(1024) typename Rows::Storage k, v;
};

/// What a warp walks: its steps of the block's split, on the absolute grid of kStepKeys keys.
template <int kHeadDim>
struct WarpSteps {
  int32_t first_key;  // of step 0
  int32_t count;
  Q1M_DEVICE WarpSteps(KeyRange keys, int warp) {
    constexpr int kKeys = kStepKeys<kHeadDim>;
    const int32_t begin = keys.begin / kKeys, end = div_up(keys.end, kKeys);
    first_key = (begin + warp) * kKeys;
    count = begin + warp < end ? (end - begin - warp + kDecodeWarps - 1) / kDecodeWarps : 0;
  }
  Q1M_DEVICE int32_t key(int32_t step) const {
    return first_key + step * (kDecodeWarps * kStepKeys<kHeadDim>);
  }
};

/// Ring<D>: kStages; Storage; Params with DecodeLaunch `launch`; start(step), wait(), stage(),
/// next() (see decode_attention_sm80.cuh).
template <int kHeadDim, int kRowTiles, typename Cache, template <int> typename RingOf>
struct DecodeAttention {
  // --- Config --------------------------------------------------------------------------------
  static constexpr int D = kHeadDim;
  static constexpr bool kFp8 = sizeof(Cache) == 1;
  /// Dims of a cache row for whoever copies it: it sees numbers of two bytes.
  static constexpr int kStoredDim = kFp8 ? D / 2 : D;
  static constexpr int kKeys = kStepKeys<kStoredDim>;
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kRows = 16 * kRowTiles;
  static_assert(kStoredDim == 32 || kStoredDim == 64 || kStoredDim == 128, "RowTile has these");

  using Ring = RingOf<kStoredDim>;
  using Params = typename Ring::Params;
  using Queries = RowTile<D, kRows>;
  using Keys = typename DecodeStage<kStoredDim>::Rows;
  using Merge = DecodeMerge<D, kRows, kFp8>;

  // --- Smem ----------------------------------------------------------------------------------
  struct Smem {
    union {
      alignas(1024) typename Ring::Stages stages;
      typename Merge::Smem merge;  // after the last step
    };
    typename Queries::Storage q;  // rotated
    typename Ring::Barriers barriers;
  };
  using SharedSmem = arch::Shared<Smem>;

  // --- Queries -------------------------------------------------------------------------------
  /// Rotates the block's rows to their positions for its keys, in fp32 with one rounding. Rows
  /// behind the last become zero.
  static Q1M_DEVICE void rotate_queries(const DecodeAttentionParams& p, const DecodeWork& work,
                                        Queries to) {
    constexpr int kChunks = D / 16;  // of 8 dims, in one half of a row
    const auto q = p.q.as<const bf16>();
    const int64_t key_chunk = p.dual_chunk.chunk(work.keys.begin);
    Q1M_NO_UNROLL
    for (int i = arch::thread_index(); i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      arch::Vec16 low = {}, high = {};
      if (row < work.num_rows) {
        const bf16* from = q.at(work.batch, work.q_token(row), work.q_head(row), chunk * 8);
        low = arch::global_load(reinterpret_cast<const arch::Vec16*>(from));
        high = arch::global_load(reinterpret_cast<const arch::Vec16*>(from + D / 2));
        const int64_t token = work.token(row), apart = p.dual_chunk.chunk(token) - key_chunk;
        // A row whose chunk lies before the keys sees none of them; any position will do.
        const int stage = apart >= 2 ? 0 : apart == 1 ? 1 : 2;
        const float* table = p.rope_table.at(query_position(p.dual_chunk, stage, token), chunk * 8);
        Q1M_UNROLL
        for (int w = 0; w < 4; ++w) {
          const auto cs = arch::global_load(reinterpret_cast<const arch::Vec16*>(table + 4 * w));
          if constexpr (kFp8) {
            rotate_pair_f16(cs, low.word[w], high.word[w]);
          } else {
            rotate_pair(cs, low.word[w], high.word[w]);
          }
        }
      }
      if constexpr (kFp8) {
        store_query_f16(to, row, chunk, low);
        store_query_f16(to, row, chunk + kChunks, high);
      } else {
        arch::shared_store(to.at(row, chunk), low);
        arch::shared_store(to.at(row, chunk + kChunks), high);
      }
    }
  }

  // --- Consume -------------------------------------------------------------------------------
  using Fp8 = DecodeProductsFp8<D, kRowTiles, kKeys>;
  using Scores = float[kRowTiles][kKeys / 2];
  using Outputs = float[kRowTiles][D / 2];
  /// Queries stay in registers where there is room for them; else each step reads them again.
  static constexpr bool kQueriesInRegisters = kRowTiles * D <= 128;
  using QueryFragments = uint32_t[kQueriesInRegisters ? kRowTiles : 1][D / 16][4];

  static Q1M_DEVICE void load_query(uint32_t (&a)[4], Queries from, int tile, int step) {
    const int lane = arch::lane_index();
    arch::ldmatrix_x4(a, from.at(16 * tile + lane % 16, 2 * step + lane / 16));
  }

  /// Four accumulators of one mma.sync among those of a thread.
  template <int kCount>
  static Q1M_DEVICE float (&quad(float (&x)[kCount], int group))[4] {
    return reinterpret_cast<float (&)[4]>(x[4 * group]);
  }

  /// s = q k^T of the step.
  static Q1M_DEVICE void multiply_qk(Scores& s, const QueryFragments& held, Queries q, Keys k) {
    const int lane = arch::opaque(arch::lane_index());
    Q1M_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      Q1M_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) s[tile][i] = 0;
    }
    Q1M_UNROLL
    for (int step = 0; step < D / 16; step += 2) {
      uint32_t a[2][kRowTiles][4];
      Q1M_UNROLL
      for (int half = 0; half < 2; ++half) {
        Q1M_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          if constexpr (kQueriesInRegisters) {
            Q1M_UNROLL
            for (int i = 0; i < 4; ++i) a[half][tile][i] = held[tile][step + half][i];
          } else {
            load_query(a[half][tile], q, tile, step + half);
          }
        }
      }
      if constexpr (kFp8) {
        Fp8::multiply_qk(s, a, k, step, lane);
      } else {
        multiply_qk_step(s, a, k, step, lane);
      }
    }
  }
  /// Adds two steps of 16 dims, `step` and the next.
  static Q1M_DEVICE void multiply_qk_step(Scores& s, const uint32_t (&a)[2][kRowTiles][4], Keys k,
                                          int step, int lane) {
    Q1M_UNROLL
    for (int half = 0; half < 2; ++half) {
      Q1M_UNROLL
      for (int j = 0; j < kKeys / 8; j += 2) {  // two groups of 8 keys
        uint32_t r[4];
        arch::ldmatrix_x4(r,
                          k.at(8 * j + lane % 8 + lane / 16 * 8, 2 * (step + half) + lane / 8 % 2));
        Q1M_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          arch::mma_m16n8k16(quad(s[tile], j), a[half][tile], {r[0], r[1]});
          arch::mma_m16n8k16(quad(s[tile], j + 1), a[half][tile], {r[2], r[3]});
        }
      }
    }
  }

  /// o += p v.
  static Q1M_DEVICE void multiply_pv(Outputs& o, const uint32_t (&p)[kRowTiles][kKeys / 16][4],
                                     Keys v) {
    const int lane = arch::opaque(arch::lane_index());
    Q1M_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      Q1M_UNROLL
      for (int j = 0; j < D / 8; j += 2) {  // two groups of 8 dims
        uint32_t r[4];
        arch::ldmatrix_x4_transposed(r, v.at(step * 16 + lane % 16, j + lane / 16));
        Q1M_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          arch::mma_m16n8k16(quad(o[tile], j), p[tile][step], {r[0], r[1]});
          arch::mma_m16n8k16(quad(o[tile], j + 1), p[tile][step], {r[2], r[3]});
        }
      }
    }
  }

  /// Scores of keys outside of [begin, end[h]) become -inf, for the thread's rows h of a tile.
  static Q1M_DEVICE void mask_scores(float (&s)[kKeys / 2], int first_key, int begin,
                                     const int (&end)[2]) {
    const int column = first_key + 2 * (arch::lane_index() % 4);
    Q1M_UNROLL
    for (int h = 0; h < 2; ++h) {
      Q1M_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) {
        Q1M_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int key = column + 8 * j + e;
          if (key < begin || key >= end[h]) s[4 * j + 2 * h + e] = -INFINITY;
        }
      }
    }
  }

  static Q1M_DEVICE void attend(const Params& p, const DecodeWork& work, SharedSmem smem) {
    const DecodeAttentionParams& args = p.launch.args;
    const int warp = arch::warp_index(), lane = arch::lane_index();
    const WarpSteps<kStoredDim> steps(work.keys, warp);
    Ring ring(p, work, steps, Q1M_SHARED_MEMBER(smem, stages), Q1M_SHARED_MEMBER(smem, barriers));
    Q1M_NO_UNROLL
    for (int i = 0; i < Ring::kStages; ++i) ring.start(i);

    const Queries q{Q1M_SHARED_MEMBER(smem, q)};
    rotate_queries(args, work, q);
    Outputs o;
    RowSoftmax softmax[kRowTiles];
    float scale_log2[kRowTiles][2];  // of the thread's rows
    int end[kRowTiles][2];           // keys that they may see
    Q1M_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      Q1M_UNROLL
      for (int i = 0; i < D / 2; ++i) o[tile][i] = 0;
      Q1M_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * tile + lane / 4 + 8 * h, visible = work.token(row) + 1;
        scale_log2[tile][h] = Merge::scale_log2(args, work, row);
        end[tile][h] = visible < work.keys.end ? visible : work.keys.end;
      }
    }
    const int all_see = work.token(0) + 1;  // keys that every row may see
    arch::block_sync();                     // the queries are there
    QueryFragments held;
    if constexpr (kQueriesInRegisters) {
      Q1M_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        Q1M_UNROLL
        for (int step = 0; step < D / 16; ++step) load_query(held[tile][step], q, tile, step);
      }
    }

    Q1M_NO_UNROLL
    for (int i = 0; i < steps.count; ++i) {
      ring.wait(i);
      const auto stage = ring.stage();
      const int first_key = steps.key(i), last_key = first_key + kKeys - 1;
      Scores s;
      multiply_qk(s, held, q, {Q1M_SHARED_MEMBER(stage, k)});
      const bool hides_keys =
          first_key < work.keys.begin || last_key >= work.keys.end || last_key >= all_see;
      uint32_t probabilities[kRowTiles][kKeys / 16][4];
      Q1M_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        if (hides_keys) mask_scores(s[tile], first_key, work.keys.begin, end[tile]);
        softmax[tile].template step<true>(s[tile], scale_log2[tile]);
        softmax[tile].rescale(o[tile]);
        if constexpr (kFp8) {
          Fp8::pack_probabilities(probabilities[tile], s[tile]);
        } else {
          pack_probabilities<kKeys>(probabilities[tile], s[tile]);
        }
      }
      const Keys v{Q1M_SHARED_MEMBER(stage, v)};
      if constexpr (kFp8) {
        Fp8::multiply_pv(o, probabilities, v, arch::opaque(lane));
      } else {
        multiply_pv(o, probabilities, v);
      }
      arch::warp_sync();  // all lanes are done with the stage
      ring.start(i + Ring::kStages);
      ring.next();
    }
    ring.finish();
    Merge::finish(p.launch, work, Q1M_SHARED_MEMBER(smem, merge), softmax, o, scale_log2);
  }

  // --- Run -----------------------------------------------------------------------------------
  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    DecodeWork work;
    if (!find_work<kRows>(p.launch, arch::block_index(), work)) return;
    if (work.kv_len == 0) {
      Merge::store_empty(p.launch.args, work);
    } else {
      attend(p, work, arch::shared_memory<Smem>());
    }
  }
};

}  // namespace qwen1m
