#pragma once
/// Host side that the GPU kernels of sparse_estimate and their emulation share: what the kernels
/// demand beyond the op's contract, and the launches of a call.

#include <cstdint>
#include <string>

#include "common/attention/attention_check.h"
#include "ops/sparse_estimate/sparse_estimate_sm80.cuh"

namespace qwen1m {

/// Values of tensors are not looked at.
inline void check_sparse_estimate_gpu(const SparseEstimateParams& p) {
  check_attention_layout(p);
  const ArgCheck args("sparse_estimate");
  if (p.q.dtype != DType::kBFloat16) {
    args.fail("q", "dtype bfloat16 (the GPU kernels have no other)", dtype_name(p.q.dtype));
  }
  const int64_t head_dim = p.q.size(2);
  args.require(head_dim == 64 || head_dim == 128, "q", "head_dim D 64 or 128 on a GPU", head_dim);
  args.require(p.q.size(0) <= kEstimateRows, "q", "at most 64 rows on a GPU", p.q.size(0));
  const auto aligned = [&](const char* name, const void* data) {
    args.require(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, "data aligned to 16 bytes",
                 reinterpret_cast<uintptr_t>(data) % 16);
  };
  aligned("q", p.q.data);
  aligned("k_cache", p.k_cache.data);
  aligned("rope_table", p.rope_table.data);
  for (const int dim : {0, 1}) {
    args.require(p.q.stride(dim) % 8 == 0, "q",
                 "stride of dimension " + std::to_string(dim) + " a multiple of 8",
                 p.q.stride(dim));
  }
  constexpr int64_t kMaxTokens = int64_t{1} << 31;  // positions are 32-bit inside a kernel
  args.require(p.segment_end + 2 * kEstimateKeys < kMaxTokens, "segment_end", "below 2^31 - 64",
               p.segment_end);
}

/// Calls launch(kernel, blocks, threads, args) for each kernel in turn. `kernel` is an object of
/// its type.
template <int kHeadDim, typename Launch>
void for_each_launch(const SparseEstimateParams& p, const Launch& launch) {
  const EstimateGrid grid(p);
  const int64_t blocks = p.k_cache.size(1) * grid.blocks_of_group;  // of a span
  const auto threads = static_cast<int>(32 * grid.heads);
  launch(EstimateStatisticsSm80<kHeadDim>{}, blocks * grid.num_spans, threads,
         SparseEstimateArgs{p, grid, 0, grid.num_spans});
  launch(EstimateCombine{}, p.q.size(1), EstimateCombine::kThreads,
         SparseEstimateArgs{p, grid, 0, grid.num_spans});
  if (grid.num_spans > 1) {
    launch(EstimateSumsSm80<kHeadDim>{}, blocks * (grid.num_spans - 1), threads,
           SparseEstimateArgs{p, grid, 1, grid.num_spans - 1});
  }
  launch(EstimateSumsSm80<kHeadDim>{}, blocks, threads, SparseEstimateArgs{p, grid, 0, 1});
}

}  // namespace qwen1m
