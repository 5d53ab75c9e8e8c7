#pragma once
/// The CPU backend with the block kernels chosen by the caller; for tests and benches of each
/// instruction set.

#include "common/attention/block_kernel.h"
#include "qwen1m/sparse_prefill.h"

namespace qwen1m {

/// sparse_prefill_cpu with `kernels`, which are for the dtype of the arguments.
void sparse_prefill_cpu(const SparsePrefillParams&, const ParallelFor&, BlockKernels kernels);

}  // namespace qwen1m
