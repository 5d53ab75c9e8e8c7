#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// What follows the QKV projection: bias added, queries copied out un-rotated, keys rotated at
/// their Dual Chunk position (positions[t] % chunk_len) and written to the paged cache with the
/// values. Rotary pairs are (d, d + D/2) (GPT-NeoX). Arithmetic in fp32, one rounding per value.
///
/// The queries stay un-rotated because attention rotates them once per key range
/// (see prefill_attention.h). With q_heads == 0 only keys and values are appended.
struct QkvRopeAppendParams {
  AnyView<3> q;        // [tokens, q_heads, D] written; fp32 or bf16; last two dims contiguous
  AnyView<4> k_cache;  // [pages, kv_heads, 128, D], contiguous; the token's row is written; as q,
                       // or float8_e4m3fn with k_scale and v_scale: e4m3(key / k_scale), saturating
  AnyView<4> v_cache;  // as k_cache
  AnyView<2> qkv;   // [tokens, (q_heads + 2 kv_heads) D] as q: q, k, v columns; last dim contiguous
  AnyView<1> bias;  // [(q_heads + 2 kv_heads) D] as q, contiguous; data null: no bias
  TensorView<const int64_t, 1> positions;     // [tokens], absolute token index, >= 0
  TensorView<const int64_t, 1> slot_mapping;  // [tokens], page * 128 + row; -1: append nothing
  TensorView<const float, 3> rope_table;      // [rows, D/2, 2] (cos, sin), contiguous
  int64_t chunk_len = 0;                      // tokens, > 0
  TensorView<const float, 1> k_scale{};       // [kv_heads], > 0; data null: no fp8
  TensorView<const float, 1> v_scale{};       // as k_scale
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit, a slot outside the cache or
/// a position outside the table. Two tokens must not share a slot.
void qkv_rope_append_cpu(const QkvRopeAppendParams&, const ParallelFor&);

/// sm_80 and later: bf16, with a cache in bf16 or fp8; D a multiple of 16, rows aligned to 16
/// bytes. All data lie on the current device; slots, positions and scales are not checked, because
/// that would stop the stream: a slot outside of the cache appends nothing, and the keys of a
/// position outside of the table become NaN. Asynchronous. Throws as above, and on a launch that
/// fails.
void qkv_rope_append_cuda(const QkvRopeAppendParams&, Stream);

}  // namespace qwen1m
