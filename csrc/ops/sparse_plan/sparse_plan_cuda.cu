// CUDA backend of sparse_plan: one kernel for every architecture from sm_80 on.
#include "arch/cuda/host.h"
#include "arch/cuda/kernel.cuh"
#include "ops/sparse_plan/sparse_plan_check.h"
#include "ops/sparse_plan/sparse_plan_sm80.cuh"

namespace qwen1m {
namespace {

Q1M_KERNEL_SM80(sparse_plan_kernel, SparsePlanSm80, 1)

}  // namespace

void sparse_plan_cuda(const SparsePlanParams& p, Stream stream) {
  check_sparse_plan_layout(p);
  arch::require_sm80("sparse_plan");
  arch::launch(sparse_plan_kernel,
               {.name = "sparse_plan_kernel",
                .blocks = SparsePlanSm80::num_blocks(p),
                .threads = SparsePlanSm80::kThreads,
                .shared_bytes = sizeof(SparsePlanSm80::Smem),
                .stream = stream},
               SparsePlanSm80::Params{p});
}

}  // namespace qwen1m
