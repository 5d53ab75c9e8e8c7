#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Some pages of an fp8 cache in the computing dtype: wide = codes * scale of the head, the product
/// rounded once; exact for bf16 and scales that are powers of two. A NaN stays one. Other pages are
/// left alone.
///
/// For prefill, which reads every key once per tile of queries and query head: widened once per
/// chunk and layer, 3 bytes of traffic per value stand beside 2 * head_dim * rows of the chunk
/// products of each key and query head, and the products take bf16 operands from where TMA put
/// them.
struct WidenPagesParams {
  AnyView<4> wide;                   // [pages, kv_heads, 128, D], contiguous; fp32 or bf16; written
  AnyView<4> codes;                  // [pages, kv_heads, 128, D], contiguous; float8_e4m3fn
  TensorView<const float, 1> scale;  // [kv_heads], > 0
  TensorView<const int64_t, 1> pages;  // [n], of the cache; no page twice
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit, and on a page outside of the
/// cache before anything is written.
void widen_pages_cpu(const WidenPagesParams&, const ParallelFor&);

/// sm_80 and later: bf16, D a multiple of 8, data aligned to 16 bytes. All data lie on the current
/// device; pages and scales are not checked, because that would stop the stream: a page outside of
/// the cache is not written. Asynchronous. Throws as above, and on a launch that fails.
void widen_pages_cuda(const WidenPagesParams&, Stream);

}  // namespace qwen1m
