#pragma once
/// The rules of widen_pages' arguments, for every backend.

#include <string>

#include "common/check.h"
#include "common/fp8_cache.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/widen_pages.h"

namespace qwen1m {

/// Shapes, dtypes and strides.
inline void check_widen_pages_layout(const WidenPagesParams& p) {
  ArgCheck args("widen_pages");
  args.shape("wide", p.wide, {"pages", "kv_heads", kPageSize, "D"});
  args.dense_from(0, "wide", p.wide);
  args.shape("codes", p.codes, {"pages", "kv_heads", kPageSize, "D"});
  args.dense_from(0, "codes", p.codes);
  if (p.codes.dtype != DType::kFloat8E4M3) {
    args.fail("codes", "dtype float8_e4m3fn", dtype_name(p.codes.dtype));
  }
  args.shape("scale", p.scale, {"kv_heads"});
  args.shape("pages", p.pages, {"n"});
}

/// Pages and scales lie on the host.
inline void check_widen_pages_values(const WidenPagesParams& p) {
  const ArgCheck args("widen_pages");
  check_cache_scales(args, "scale", p.scale);
  for (int64_t i = 0; i < p.pages.size(0); ++i) {
    const int64_t page = *p.pages.at(i), pages = p.codes.size(0);
    if (page >= 0 && page < pages) continue;
    args.fail("pages[" + std::to_string(i) + "]",
              "a page in [0, pages=" + std::to_string(pages) + ")", std::to_string(page));
  }
}

}  // namespace qwen1m
