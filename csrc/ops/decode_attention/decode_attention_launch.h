#pragma once
/// Host side that the GPU kernels and their emulation share: what the kernels demand beyond the
/// op's contract, the grid, and where in the scratch things lie.

#include <cstdint>
#include <string>

#include "common/attention/attention_gpu.h"
#include "ops/decode_attention/decode_attention_grid.h"
#include "ops/decode_attention/decode_attention_sm80.cuh"
#include "ops/decode_attention/decode_attention_sm90.cuh"

namespace qwen1m {

inline DecodeAttentionShape shape_of(const DecodeAttentionParams& p) {
  return {.batch = p.q.size(0),
          .q_tokens = p.q.size(1),
          .q_heads = p.q.size(2),
          .kv_heads = p.k_cache.size(1),
          .head_dim = p.q.size(3),
          .max_tokens = p.block_table.size(1) * kPageSize,
          .dual_chunk = p.dual_chunk};
}

/// An fp8 cache as the copies see it: rows of half as many numbers of two bytes.
inline AnyView<4> two_byte_rows(AnyView<4> cache) {
  cache.dtype = DType::kBFloat16;
  cache.sizes[3] /= 2;
  for (int dim = 0; dim < 3; ++dim) cache.strides[static_cast<size_t>(dim)] /= 2;
  return cache;
}

/// bf16 or an fp8 cache with it, head_dim 64 or 128, 16-byte pieces wherever rows are read or
/// written, enough scratch. Returns the launch for a GPU of num_sms multiprocessors.
inline DecodeLaunch plan_decode_attention(const DecodeAttentionParams& p, int num_sms) {
  check_attention_layout(p);
  check_attention_gpu("decode_attention", p);
  const ArgCheck args("decode_attention");
  const bool fp8 = p.k_cache.dtype == DType::kFloat8E4M3;
  const DecodeAttentionShape shape = shape_of(p);
  const int64_t scratch_bytes = decode_attention_scratch_bytes(shape, num_sms);
  args.require(p.scratch.size(0) >= scratch_bytes, "scratch",
               "at least " + std::to_string(scratch_bytes) + " bytes", p.scratch.size(0));
  args.require(p.scratch.stride(0) == 1, "scratch", "contiguous bytes", p.scratch.stride(0));
  args.require(reinterpret_cast<uintptr_t>(p.scratch.data) % 16 == 0, "scratch",
               "data aligned to 16 bytes", reinterpret_cast<uintptr_t>(p.scratch.data) % 16);
  // The accumulators of 32 rows and the scores of an fp8 step would spill.
  const DecodeGrid grid(shape, num_sms, fp8 ? 16 : 32);
  DecodeAttentionParams stored = p;
  if (fp8) {
    stored.k_cache = two_byte_rows(p.k_cache);
    stored.v_cache = two_byte_rows(p.v_cache);
  }
  return {.args = stored,
          .wanted_splits = grid.wanted_splits,
          .max_splits = grid.max_splits,
          .rows = grid.rows,
          .row_blocks = grid.row_blocks,
          .counters = reinterpret_cast<uint32_t*>(p.scratch.data),
          .partials = reinterpret_cast<float*>(p.scratch.data + kCounterBytes)};
}

}  // namespace qwen1m
