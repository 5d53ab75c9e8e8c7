#pragma once
/// The unit of work of the GPU kernels of prefill attention, dense and sparse: some query tokens of
/// one head, all in one DCA chunk.

#include <cstdint>

#include "arch/arch.h"
#include "qwen1m/dual_chunk.h"

namespace qwen1m {

/// Query tokens of a tile: 128 of one query head, fewer at the end of a chunk or of the call.
inline constexpr int64_t kTileTokens = 128;

/// One block's work.
struct PrefillTile {
  int32_t batch, q_head, kv_head;
  int32_t first_token, num_tokens;
  int64_t row;            // of q and out, of the first token
  int32_t first_row = 0;  // the call has rows [first_row, num_tokens) of the tile

  Q1M_HOST_DEVICE bool has_row(int32_t index) const {
    return index >= first_row && index < num_tokens;
  }
  Q1M_HOST_DEVICE int32_t last_token() const { return first_token + num_tokens - 1; }
};

/// Position that the query of a token is rotated to in a stage: 0 inter, 1 successive, 2 intra
/// keys.
Q1M_HOST_DEVICE int64_t query_position(const DualChunk& chunks, int stage, int64_t token) {
  return stage == 0   ? chunks.inter_position()
         : stage == 1 ? chunks.successive_position(token)
                      : chunks.intra_position(token);
}
/// The same for the arguments of an op; one with positions of its own has an overload.
template <typename Params>
Q1M_HOST_DEVICE int64_t query_position(const Params& p, int stage, int64_t token) {
  return query_position(p.dual_chunk, stage, token);
}

}  // namespace qwen1m
