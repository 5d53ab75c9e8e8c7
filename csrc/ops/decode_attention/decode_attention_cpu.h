#pragma once
/// The CPU backend with the block kernels chosen by the caller; for tests and benches of each
/// instruction set.

#include "common/attention/block_kernel.h"
#include "qwen1m/decode_attention.h"

namespace qwen1m {

/// decode_attention_cpu with `kernels`, which are for the dtype of the arguments.
void decode_attention_cpu(const DecodeAttentionParams&, const ParallelFor&, BlockKernels kernels);

}  // namespace qwen1m
