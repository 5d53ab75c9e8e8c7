#pragma once
/// The rules of qkv_rope_append's arguments, for every backend.

#include <string>

#include "common/check.h"
#include "common/fp8_cache.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/qkv_rope_append.h"

namespace qwen1m {

/// Shapes, dtypes and strides.
inline void check_qkv_rope_append_layout(const QkvRopeAppendParams& p) {
  ArgCheck args("qkv_rope_append");
  args.shape("q", p.q, {"tokens", "q_heads", "D"});
  const int64_t head_dim = args.size("D");
  args.require(head_dim > 0 && head_dim % 2 == 0, "q", "an even head_dim D > 0", head_dim);
  args.dense_from(1, "q", p.q);
  args.separate_rows("q", p.q);
  check_scales_together(args, p.k_scale, p.v_scale);
  args.shape("k_cache", p.k_cache, {"pages", "kv_heads", kPageSize, "D"});
  check_cache_dtype(args, "k_cache", p.k_cache, p.q, "k_scale", p.k_scale);
  args.dense_from(0, "k_cache", p.k_cache);
  args.shape("v_cache", p.v_cache, {"pages", "kv_heads", kPageSize, "D"});
  check_cache_dtype(args, "v_cache", p.v_cache, p.q, "v_scale", p.v_scale);
  args.dense_from(0, "v_cache", p.v_cache);
  const Dim columns("(q_heads + 2 kv_heads) D",
                    (args.size("q_heads") + 2 * args.size("kv_heads")) * head_dim);
  args.shape("qkv", p.qkv, {"tokens", columns});
  args.same_dtype("qkv", p.qkv, "q", p.q);
  args.dense_from(1, "qkv", p.qkv);
  if (p.bias) {
    args.shape("bias", p.bias, {columns});
    args.same_dtype("bias", p.bias, "q", p.q);
    args.dense_from(0, "bias", p.bias);
  }
  args.shape("positions", p.positions, {"tokens"});
  args.shape("slot_mapping", p.slot_mapping, {"tokens"});
  args.shape("rope_table", p.rope_table, {"rows", {"D/2", head_dim / 2}, 2});
  args.dense_from(0, "rope_table", p.rope_table);
  args.require(p.chunk_len > 0, "chunk_len", "a number of tokens > 0", p.chunk_len);
}

/// Slots and positions lie on the host. Before anything is written, so that a call that throws
/// leaves the cache as it was.
inline void check_qkv_rope_append_values(const QkvRopeAppendParams& p) {
  const ArgCheck args("qkv_rope_append");
  check_cache_scales(args, "k_scale", p.k_scale);
  check_cache_scales(args, "v_scale", p.v_scale);
  const int64_t slots = p.k_cache.size(0) * kPageSize, rows = p.rope_table.size(0);
  for (int64_t t = 0; t < p.q.size(0); ++t) {
    const int64_t slot = *p.slot_mapping.at(t), position = *p.positions.at(t);
    if (slot == -1) continue;
    if (slot < 0 || slot >= slots) {
      args.fail("slot_mapping[" + std::to_string(t) + "]",
                "-1 or a slot below pages * 128 = " + std::to_string(slots), std::to_string(slot));
    }
    if (position < 0 || position % p.chunk_len >= rows) {
      args.fail("positions[" + std::to_string(t) + "]",
                "a position >= 0 with position % chunk_len (" + std::to_string(p.chunk_len) +
                    ") below the " + std::to_string(rows) + " rows of rope_table",
                std::to_string(position));
    }
  }
}

}  // namespace qwen1m
