#pragma once
/// The KV cache in fp8: e4m3 with a scale for each KV head, key = k_scale * e4m3.

#include <cmath>
#include <string>

#include "common/check.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// dtype of a cache: without a scale that of q, with one float8_e4m3fn. "kv_heads" has been met.
template <typename Q>
void check_cache_dtype(ArgCheck& args, const char* name, const AnyView<4>& cache, const Q& q,
                       const char* scale_name, const TensorView<const float, 1>& scale) {
  if (!scale) {
    args.same_dtype(name, cache, "q", q);
    return;
  }
  args.shape(scale_name, scale, {"kv_heads"});
  if (cache.dtype != DType::kFloat8E4M3) {
    args.fail(name, "dtype float8_e4m3fn (with " + std::string(scale_name) + ")",
              dtype_name(cache.dtype));
  }
}

/// Keys and values are both in fp8 or neither is.
inline void check_scales_together(const ArgCheck& args, const TensorView<const float, 1>& k_scale,
                                  const TensorView<const float, 1>& v_scale) {
  if (!k_scale == !v_scale) return;
  args.fail(k_scale ? "v_scale" : "k_scale",
            std::string("a tensor (there is a ") + (k_scale ? "k_scale" : "v_scale") + ")", "none");
}

/// The scales lie on the host.
inline void check_cache_scales(const ArgCheck& args, const char* name,
                               const TensorView<const float, 1>& scale) {
  if (!scale) return;
  for (int64_t h = 0; h < scale.size(0); ++h) {
    const float value = *scale.at(h);
    args.require(value > 0 && std::isfinite(value),
                 std::string(name) + "[" + std::to_string(h) + "]", "a finite scale > 0", value);
  }
}

/// Scale of a KV head; 1 without fp8.
inline float cache_scale(const TensorView<const float, 1>& scale, int64_t kv_head) {
  return scale ? *scale.at(kv_head) : 1.0f;
}

}  // namespace qwen1m
