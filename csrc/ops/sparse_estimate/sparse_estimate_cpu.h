#pragma once
/// The CPU backend with the block kernels chosen by the caller; for tests and benches of each
/// instruction set.

#include "common/attention/block_kernel.h"
#include "qwen1m/sparse_estimate.h"

namespace qwen1m {

/// sparse_estimate_cpu with `kernels`, which are for the dtype of the arguments.
void sparse_estimate_cpu(const SparseEstimateParams&, const ParallelFor&, BlockKernels kernels);

}  // namespace qwen1m
