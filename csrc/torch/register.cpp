// Every schema of torch.ops.qwen1m, in one screen. Ops write into their arguments and return
// nothing, so that callers own all memory (CUDA graphs, plans) and fakes are trivial.
// The contract of each op is the comment of its Params struct in include/qwen1m/<op>.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(qwen1m, m) {
  m.def("embedding(Tensor(a!) out, Tensor weight, Tensor token_ids) -> ()");
  m.def("rms_norm(Tensor(a!) out, Tensor(b!)? residual, Tensor x, Tensor weight, float eps) -> ()");
  m.def("swiglu(Tensor(a!) out, Tensor gate_up) -> ()");
  m.def(
      "qkv_rope_append(Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor qkv, "
      "Tensor? bias, Tensor positions, Tensor slot_mapping, Tensor rope_table, int chunk_len, "
      "Tensor? k_scale, Tensor? v_scale) -> ()");
  m.def("widen_pages(Tensor(a!) wide, Tensor codes, Tensor scale, Tensor pages) -> ()");
  m.def(
      "prefill_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, "
      "Tensor v_cache, Tensor block_table, Tensor cu_q, Tensor kv_len, Tensor logit_scale, "
      "Tensor rope_table, int chunk_size, int local_size) -> ()");
  m.def(
      "decode_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, "
      "Tensor v_cache, Tensor block_table, Tensor kv_len, Tensor logit_scale, "
      "Tensor rope_table, int chunk_size, int local_size, Tensor(c!)? scratch=None, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
  m.def(
      "sparse_estimate(Tensor(a!) vertical, Tensor(b!) slash, Tensor q, Tensor k_cache, "
      "Tensor block_table, Tensor logit_scale, Tensor rope_table, int segment_end, "
      "int chunk_size, int local_size, bool critical) -> ()");
  m.def(
      "sparse_plan(Tensor(a!) verticals, Tensor(b!) vertical_count, Tensor(c!) runs, "
      "Tensor(d!) run_count, Tensor vertical_score, Tensor slash_score, Tensor v_size, "
      "Tensor s_size, int segment_begin, int chunk_size, int local_size, int tile_tokens, "
      "int group, bool exact, bool fallback) -> ()");
  m.def(
      "sparse_prefill(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, "
      "Tensor block_table, Tensor logit_scale, Tensor rope_table, Tensor verticals, "
      "Tensor vertical_count, Tensor runs, Tensor run_count, Tensor(c!)? scratch, int q_begin, "
      "int segment_begin, int segment_end, int chunk_size, int local_size, int tile_tokens, "
      "bool exact) -> ()");
  m.def(
      "sample(Tensor(a!) token_ids, Tensor(b!)? logprobs, Tensor(c!)? history, Tensor logits, "
      "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor? penalties, "
      "Tensor seed, Tensor position) -> ()");
}
