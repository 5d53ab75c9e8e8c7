#pragma once
/// Dual Chunk Attention position rules (Qwen2.5-1M technical report, arXiv:2501.15383, section 4.1;
/// ChunkLlama, arXiv:2402.17463). Pure functions, shared by every backend.
///
/// With L = chunk_size - local_size, token p lies in chunk c = p / L at offset m = p % L.
/// Keys are rotated once, at position m. The query of token i meets the key of token j <= i at
///   intra       c_i == c_j      position m_i                     (true distance)
///   successive  c_i == c_j + 1  position min(m_i + L, chunk_size)
///   inter       c_i >= c_j + 2  position min(2 L - 1, chunk_size) (a constant)
/// Plain RoPE is the same rule with an infinite chunk.
///
/// Everything is constexpr, so that device code may call it (nvcc --expt-relaxed-constexpr).

#include <algorithm>
#include <cstdint>

namespace qwen1m {

/// Tokens of a page of the KV cache; a page is one [page_size, head_dim] tile per KV head.
inline constexpr int64_t kPageSize = 128;

/// chunk_size of plain RoPE: every token lies in chunk 0.
inline constexpr int64_t kInfiniteChunk = int64_t{1} << 62;

struct DualChunk {
  int64_t chunk_size = kInfiniteChunk;  // tokens; the largest relative position
  int64_t local_size = 0;               // tokens; 0 <= local_size < chunk_size

  constexpr int64_t chunk_len() const { return chunk_size - local_size; }
  constexpr int64_t chunk(int64_t token) const { return token / chunk_len(); }
  constexpr int64_t offset(int64_t token) const { return token % chunk_len(); }

  constexpr int64_t key_position(int64_t token) const { return offset(token); }
  constexpr int64_t intra_position(int64_t token) const { return offset(token); }
  constexpr int64_t successive_position(int64_t token) const {
    return std::min(offset(token) + chunk_len(), chunk_size);
  }
  constexpr int64_t inter_position() const {  // 2 L alone would overflow for kInfiniteChunk
    return std::min(chunk_len() - 1 + chunk_len(), chunk_size);
  }

  /// Positions of the sparse selection (sparse_estimate.h) that change by one from key to key, also
  /// where those above are clamped.
  constexpr int64_t critical_successive_position(int64_t token) const {
    return offset(token) + chunk_len();
  }
  constexpr int64_t critical_inter_position(int64_t token) const {
    return offset(token) + chunk_size;
  }

  /// First token of the chunk of `token`: intra keys are [intra_begin, token].
  constexpr int64_t intra_begin(int64_t token) const { return chunk(token) * chunk_len(); }
  /// First token of the chunk before it (0 in chunk 0): successive keys are
  /// [successive_begin, intra_begin), inter keys are [0, successive_begin).
  constexpr int64_t successive_begin(int64_t token) const {
    return std::max<int64_t>(intra_begin(token) - chunk_len(), 0);
  }

  /// Rows of the rotary table that queries and keys of tokens < num_tokens read.
  constexpr int64_t table_rows(int64_t num_tokens) const {
    return num_tokens <= chunk_len() ? num_tokens : chunk_size + 1;
  }
};

}  // namespace qwen1m
