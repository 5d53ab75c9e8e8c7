// Scratch of the GPU kernels, for whoever plans memory; it needs no GPU.
#include <string>

#include "common/check.h"
#include "ops/decode_attention/decode_attention_grid.h"

namespace qwen1m {

int64_t decode_attention_scratch_bytes(const DecodeAttentionShape& shape, int num_sms) {
  const auto require = [](bool ok, const char* name, const char* expected, int64_t got) {
    if (!ok) fail_argument("decode_attention", name, expected, std::to_string(got));
  };
  require(shape.batch >= 0, "batch", "0 or more sequences", shape.batch);
  require(shape.q_tokens >= 0, "q_tokens", "0 or more query tokens", shape.q_tokens);
  require(shape.kv_heads > 0, "kv_heads", "1 or more", shape.kv_heads);
  require(shape.q_heads > 0 && shape.q_heads % shape.kv_heads == 0, "q_heads",
          "a positive multiple of kv_heads", shape.q_heads);
  require(num_sms > 0, "num_sms", "1 or more", num_sms);
  require(shape.max_tokens < int64_t{1} << 31, "max_tokens", "below 2^31", shape.max_tokens);
  const DecodeGrid grid(shape, num_sms);
  require(grid.max_splits <= kMaxSplits, "chunk_size", "fewer borders in q_tokens",
          shape.dual_chunk.chunk_size);
  // Blocks of 16 rows have more counters, and partial results of no more bytes.
  const int64_t counters = DecodeGrid(shape, num_sms, 16).sequences;
  require(counters <= kMaxCounters, "batch", "at most 16384 (sequence, KV head, 16 query rows)",
          counters);
  return kCounterBytes + grid.sequences * grid.max_splits * grid.rows * (shape.head_dim + 2) * 4;
}

}  // namespace qwen1m
