#pragma once
/// Which scores of a block of keys count, for the GPU kernels of sparse_prefill.

#include <cmath>

#include "arch/arch.h"
#include "ops/sparse_prefill/sparse_prefill_tiles.h"

namespace qwen1m {

/// A block of kKeys keys in shared memory, one or two pieces: what the warps that multiply must
/// know of it.
template <int kKeys>
struct SparseBlock {
  static constexpr int kPieces = kKeys / kPieceKeys;
  alignas(16) uint64_t bits[kGroups][kPieces];  // of SparsePiece
  int32_t last_key;                             // of all pieces
  int32_t stage;       // kStages: there is no block, the one before was the last
  int32_t num_values;  // rows of the values that hold numbers
  int32_t unused;
  int32_t position[kKeys];  // of each key
};

/// Writes piece `index` of a block, by a warp. The caller orders the writes before the reads.
template <int kKeys>
Q1M_DEVICE void write_piece(arch::Shared<SparseBlock<kKeys>> to, int index,
                            const SparsePiece& piece) {
  const int lane = arch::lane_index();
  const auto position = Q1M_SHARED_MEMBER(to, position);
  arch::shared_store(position[index * kPieceKeys + lane], piece.position[0]);
  arch::shared_store(position[index * kPieceKeys + lane + 32], piece.position[1]);
  if (lane < kGroups) {
    arch::shared_store(Q1M_SHARED_MEMBER(to, bits)[lane][index],
                       lane == 0 ? piece.bits[0] : piece.bits[1]);
  }
}

/// The rest of a block, by one thread.
template <int kKeys>
Q1M_DEVICE void write_facts(arch::Shared<SparseBlock<kKeys>> to, int32_t last_key, int32_t stage,
                            int32_t num_values) {
  const arch::Vec16 facts{{static_cast<uint32_t>(last_key), static_cast<uint32_t>(stage),
                           static_cast<uint32_t>(num_values), 0}};
  arch::shared_store(Q1M_SHARED_MEMBER(to, last_key).template as<arch::Vec16>(), facts);
}

struct SparseFacts {
  int32_t last_key = 0, stage = 0, num_values = 0;
};
template <int kKeys>
Q1M_DEVICE SparseFacts read_facts(arch::Shared<SparseBlock<kKeys>> from) {
  const auto facts =
      arch::shared_load(Q1M_SHARED_MEMBER(from, last_key).template as<arch::Vec16>());
  return {static_cast<int32_t>(facts.word[0]), static_cast<int32_t>(facts.word[1]),
          static_cast<int32_t>(facts.word[2])};
}

/// Scores of keys that a row does not attend to become -inf: those whose bit is not set for the
/// rows' group, and those behind `token` (of the thread's first row; its second is 8 tokens later).
/// No row of the caller's has a token before `first_token`.
template <int kKeys>
Q1M_DEVICE void mask_scores(float (&s)[kKeys / 2], arch::Shared<SparseBlock<kKeys>> block,
                            int32_t last_key, int group, int first_token, int token) {
  const int column = 2 * (arch::lane_index() % 4);  // the thread's first one
  const auto bits = Q1M_SHARED_MEMBER(block, bits)[group];
  Q1M_UNROLL
  for (int piece = 0; piece < kKeys / kPieceKeys; ++piece) {
    const uint64_t attended = arch::shared_load(bits[piece]);
    if (attended == ~uint64_t{0}) continue;
    Q1M_UNROLL
    for (int j = 0; j < kPieceKeys / 8; ++j) {
      const auto word = static_cast<uint32_t>(attended >> (j / 4 * 32)) >> column;
      Q1M_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& score = s[piece * kPieceKeys / 2 + 4 * j + i];
        if ((word >> (8 * (j % 4) + i % 2) & 1) == 0) score = -INFINITY;
      }
    }
  }
  if (last_key <= first_token) return;
  const auto position = Q1M_SHARED_MEMBER(block, position);
  Q1M_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    const auto two = arch::shared_load(position[8 * j + column].template as<uint64_t>());
    const auto first = static_cast<int32_t>(two), second = static_cast<int32_t>(two >> 32);
    Q1M_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (first > token + 8 * h) s[4 * j + 2 * h] = -INFINITY;
      if (second > token + 8 * h) s[4 * j + 2 * h + 1] = -INFINITY;
    }
  }
}

}  // namespace qwen1m
