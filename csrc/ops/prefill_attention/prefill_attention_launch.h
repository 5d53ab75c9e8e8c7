#pragma once
/// Host side that the GPU kernels and their emulation share: what the kernels demand beyond the
/// op's contract.

#include "common/attention/attention_gpu.h"
#include "ops/prefill_attention/prefill_attention_sm80.cuh"
#include "ops/prefill_attention/prefill_attention_sm90.cuh"

namespace qwen1m {

inline void check_prefill_attention_gpu(const PrefillAttentionParams& p) {
  check_attention_layout(p);
  check_attention_gpu("prefill_attention", p);
}

}  // namespace qwen1m
