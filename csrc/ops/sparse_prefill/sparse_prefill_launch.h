#pragma once
/// Host side that the GPU kernels of sparse_prefill and their emulation share: what the kernels
/// demand beyond the op's contract, and their parameters.

#include <cstdint>
#include <string>

#include "common/attention/attention_gpu.h"
#include "ops/sparse_prefill/sparse_prefill_gather.cuh"
#include "ops/sparse_prefill/sparse_prefill_sm80.cuh"
#include "ops/sparse_prefill/sparse_prefill_sm90.cuh"

namespace qwen1m {

/// The gathered verticals as a TMA tensor: (64 dims, row, panel, q_head, K or V); rows behind the
/// list's capacity are outside of it, and zero.
inline arch::TensorMapSpec vertical_map(const SparsePrefillParams& p) {
  const auto dim = static_cast<uint64_t>(p.scratch.size(3));
  const auto heads = static_cast<uint64_t>(p.scratch.size(1));
  const uint64_t head_bytes = static_cast<uint64_t>(p.scratch.size(2)) * dim * 2;
  return {.base = p.scratch.data,
          .element_bytes = 2,
          .sizes = {64, static_cast<uint64_t>(p.verticals.size(1)), dim / 64, heads, 2},
          .stride_bytes = {dim * 2, 128, head_bytes, heads * head_bytes},
          .box = {64, kPieceKeys, 1, 1, 1},
          .swizzle = arch::Swizzle::k128};
}

/// Half a page of one panel of dims of a cache.
inline arch::TensorMapSpec half_page_map(const AnyView<4>& cache) {
  arch::TensorMapSpec map = page_map(cache, kPieceKeys);
  map.box[2] = 1;
  return map;
}

/// Values of tensors are not looked at.
inline void check_sparse_prefill_gpu(const SparsePrefillParams& p) {
  check_attention_layout(p);
  check_attention_gpu("sparse_prefill", p);
  const ArgCheck args("sparse_prefill");
  if (!p.scratch) args.fail("scratch", "a tensor (a GPU gathers the verticals)", "none");
  const auto aligned = [&](const char* name, const void* data, uintptr_t bytes) {
    args.require(reinterpret_cast<uintptr_t>(data) % bytes == 0, name,
                 "data aligned to " + std::to_string(bytes) + " bytes",
                 reinterpret_cast<uintptr_t>(data) % bytes);
  };
  aligned("scratch", p.scratch.data, 16);
  aligned("runs", p.runs.data, 8);
  args.require(p.q.size(1) <= SparseGather::kMaxHeads, "q", "at most 256 q_heads on a GPU",
               p.q.size(1));
  args.require(p.tile_tokens == 64 || p.tile_tokens == 128 || p.tile_tokens == 256, "tile_tokens",
               "64, 128 or 256 on a GPU", p.tile_tokens);
  if (p.exact) args.fail("exact", "false on a GPU", "true");
}

}  // namespace qwen1m
