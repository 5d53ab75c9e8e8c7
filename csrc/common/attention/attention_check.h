#pragma once
/// Argument checks that the attention ops share.

#include <string_view>

#include "common/attention/query_tile.h"
#include "common/check.h"
#include "qwen1m/decode_attention.h"
#include "qwen1m/prefill_attention.h"
#include "qwen1m/sparse_estimate.h"
#include "qwen1m/sparse_prefill.h"

namespace qwen1m {

/// Throws qwen1m::Error on the first argument that does not fit the contract of the Params struct;
/// nothing has been written then. Values are checked too (lengths, page numbers, scales), because
/// each of them becomes an address.
void check_attention(const PrefillAttentionParams&);
void check_attention(const DecodeAttentionParams&);
void check_attention(const SparseEstimateParams&);
void check_attention(const SparsePrefillParams&);

/// The part that reads no tensor: for arguments whose data lie on a GPU. Their values (lengths,
/// page numbers, scales) are the caller's responsibility there, because reading them would stop the
/// stream.
void check_attention_layout(const PrefillAttentionParams&);
void check_attention_layout(const DecodeAttentionParams&);
void check_attention_layout(const SparseEstimateParams&);
void check_attention_layout(const SparsePrefillParams&);

void check_dual_chunk(const ArgCheck&, const DualChunk&);

/// What the tiles of a call have in common. The arguments have been checked.
template <typename Params>
AttentionContext attention_context(const Params& p) {
  constexpr int kHeads = std::tuple_size_v<decltype(p.q.sizes)> - 2;
  return {.q = p.q.data,
          .k_cache = p.k_cache.data,
          .v_cache = p.v_cache.data,
          .dtype = p.q.dtype,
          .cache_dtype = p.k_cache.dtype,
          .q_token_stride = p.q.stride(kHeads - 1),
          .q_head_stride = p.q.stride(kHeads),
          .kv_heads = p.k_cache.size(1),
          .group = p.q.size(kHeads) / p.k_cache.size(1),
          .head_dim = p.k_cache.size(3),
          .block_table = p.block_table,
          .rope_table = p.rope_table,
          .dual_chunk = p.dual_chunk};
}

}  // namespace qwen1m
