#pragma once
/// The CPU backend with the block kernels chosen by the caller; for tests and benches of each
/// instruction set.

#include "common/attention/block_kernel.h"
#include "qwen1m/prefill_attention.h"

namespace qwen1m {

/// prefill_attention_cpu with `kernels`, which are for the dtype of the arguments.
void prefill_attention_cpu(const PrefillAttentionParams&, const ParallelFor&, BlockKernels kernels);

}  // namespace qwen1m
