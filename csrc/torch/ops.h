#pragma once
/// The torch signatures of every op, in the order of register.cpp; the contract of each is
/// include/qwen1m/<op>.h.

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace qwen1m::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void embedding(const Tensor& out, const Tensor& weight, const Tensor& token_ids);

void rms_norm(const Tensor& out, const OptionalTensor& residual, const Tensor& x,
              const Tensor& weight, double eps);

void swiglu(const Tensor& out, const Tensor& gate_up);

void qkv_rope_append(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& qkv, const OptionalTensor& bias, const Tensor& positions,
                     const Tensor& slot_mapping, const Tensor& rope_table, int64_t chunk_len,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale);

void widen_pages(const Tensor& wide, const Tensor& codes, const Tensor& scale, const Tensor& pages);

void prefill_attention(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                       const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& cu_q, const Tensor& kv_len, const Tensor& logit_scale,
                       const Tensor& rope_table, int64_t chunk_size, int64_t local_size);

void decode_attention(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                      const Tensor& kv_len, const Tensor& logit_scale, const Tensor& rope_table,
                      int64_t chunk_size, int64_t local_size, const OptionalTensor& scratch,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale);

void sparse_estimate(const Tensor& vertical, const Tensor& slash, const Tensor& q,
                     const Tensor& k_cache, const Tensor& block_table, const Tensor& logit_scale,
                     const Tensor& rope_table, int64_t segment_end, int64_t chunk_size,
                     int64_t local_size, bool critical);

void sparse_plan(const Tensor& verticals, const Tensor& vertical_count, const Tensor& runs,
                 const Tensor& run_count, const Tensor& vertical_score, const Tensor& slash_score,
                 const Tensor& v_size, const Tensor& s_size, int64_t segment_begin,
                 int64_t chunk_size, int64_t local_size, int64_t tile_tokens, int64_t group,
                 bool exact, bool fallback);

void sparse_prefill(const Tensor& out, const OptionalTensor& lse, const Tensor& q,
                    const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                    const Tensor& logit_scale, const Tensor& rope_table, const Tensor& verticals,
                    const Tensor& vertical_count, const Tensor& runs, const Tensor& run_count,
                    const OptionalTensor& scratch, int64_t q_begin, int64_t segment_begin,
                    int64_t segment_end, int64_t chunk_size, int64_t local_size,
                    int64_t tile_tokens, bool exact);

void sample(const Tensor& token_ids, const OptionalTensor& logprobs, const OptionalTensor& history,
            const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const OptionalTensor& penalties,
            const Tensor& seed, const Tensor& position);

}  // namespace qwen1m::binding
