#pragma once
/// What the GPU kernels of attention demand of their arguments beyond the op's contract, and the
/// cache as TMA sees it.

#include <cstdint>
#include <string>
#include <string_view>

#include "arch/arch.h"
#include "common/attention/attention_check.h"

namespace qwen1m {

/// bf16, head_dim 64 or 128, and 16-byte pieces wherever rows are read or written. The layout has
/// been checked.
template <typename Params>
void check_attention_gpu(std::string_view op, const Params& p) {
  const ArgCheck args(op);
  if (p.q.dtype != DType::kBFloat16) {
    args.fail("q", "dtype bfloat16 (the GPU kernels have no other)", dtype_name(p.q.dtype));
  }
  constexpr int kLastDim = static_cast<int>(std::tuple_size_v<decltype(p.q.sizes)>) - 1;
  const int64_t head_dim = p.q.size(kLastDim);
  args.require(head_dim == 64 || head_dim == 128, "q", "head_dim D 64 or 128 on a GPU", head_dim);
  const auto aligned = [&](const char* name, const void* data) {
    args.require(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, "data aligned to 16 bytes",
                 reinterpret_cast<uintptr_t>(data) % 16);
  };
  aligned("q", p.q.data);
  aligned("out", p.out.data);
  aligned("k_cache", p.k_cache.data);
  aligned("v_cache", p.v_cache.data);
  aligned("rope_table", p.rope_table.data);
  for (int dim = 0; dim < kLastDim; ++dim) {
    const std::string text = "stride of dimension " + std::to_string(dim) + " a multiple of 8";
    args.require(p.q.stride(dim) % 8 == 0, "q", text, p.q.stride(dim));
    args.require(p.out.stride(dim) % 8 == 0, "out", text, p.out.stride(dim));
  }
  // Token positions are 32-bit inside a kernel, and a tensor map has 32-bit coordinates.
  constexpr int64_t kMaxTokens = int64_t{1} << 31;
  args.require(p.block_table.size(1) * kPageSize < kMaxTokens, "block_table",
               "max_pages * 128 below 2^31 tokens", p.block_table.size(1) * kPageSize);
}

/// The cache as a TMA tensor: (64 dims, token, panel of dims, kv_head, page). A box is `tokens` of
/// a page of one head as panels of [tokens][64], as RowTile has them; rows of 32 dims are one
/// panel.
inline arch::TensorMapSpec page_map(const AnyView<4>& cache, uint32_t tokens = kPageSize) {
  const auto pages = static_cast<uint64_t>(cache.size(0));
  const auto heads = static_cast<uint64_t>(cache.size(1));
  const auto dim = static_cast<uint64_t>(cache.size(3));
  const uint64_t page_bytes = kPageSize * dim * 2, panel = dim < 64 ? dim : 64;
  return {.base = cache.data,
          .element_bytes = 2,
          .sizes = {panel, kPageSize, dim / panel, heads, pages},
          .stride_bytes = {dim * 2, panel * 2, page_bytes, heads * page_bytes},
          .box = {static_cast<uint32_t>(panel), tokens, static_cast<uint32_t>(dim / panel), 1, 1},
          .swizzle = panel == 64 ? arch::Swizzle::k128 : arch::Swizzle::k64};
}

}  // namespace qwen1m
