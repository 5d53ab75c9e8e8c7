#pragma once
/// The entry point of a kernel struct: what the launcher's .cu file says once per instantiation.
///
///   Q1M_KERNEL_SM90(prefill_attention_sm90_d128, PrefillAttentionSm90<128>, 1)
///
/// defines `__global__ void prefill_attention_sm90_d128(Kernel::Params)`, which calls Kernel::run.
/// The kernel has kThreads threads; `min_blocks` of them share a multiprocessor. The name is what
/// profilers and tests/cuda/kernels.json call it.
///
/// A file may be compiled for several architectures. In those that a kernel is not written for its
/// body is empty: nobody launches it there.

#include "arch/arch.h"

#define Q1M_KERNEL(name, Kernel, min_blocks, body)                               \
  extern "C" __global__ void __launch_bounds__(Kernel::kThreads, min_blocks)     \
      name([[maybe_unused]] const __grid_constant__ typename Kernel::Params p) { \
    body;                                                                        \
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
#define Q1M_KERNEL_SM90(name, Kernel, min_blocks) \
  Q1M_KERNEL(name, Kernel, min_blocks, Kernel::run(p))
#else
#define Q1M_KERNEL_SM90(name, Kernel, min_blocks) Q1M_KERNEL(name, Kernel, min_blocks, )
#endif

/// For every architecture from sm_80 on.
#define Q1M_KERNEL_SM80(name, Kernel, min_blocks) \
  Q1M_KERNEL(name, Kernel, min_blocks, Kernel::run(p))
