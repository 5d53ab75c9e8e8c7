#pragma once
/// The host's side of a launch: tensor maps, device facts, errors. It needs the CUDA runtime only,
/// which is linked statically, and finds the driver at run time: a program with these functions
/// starts on a machine without a GPU.

#include <cstdint>

#include "arch/arch.h"
#include "qwen1m/stream.h"

namespace qwen1m::arch {

/// Throws qwen1m::Error with the call, the name of the error and its text unless `code` (a
/// cudaError_t) is cudaSuccess. Q1M_CUDA_CHECK(cudaMemsetAsync(...)).
void check_cuda(int code, const char* call);
#define Q1M_CUDA_CHECK(call) ::qwen1m::arch::check_cuda(static_cast<int>(call), #call)

struct DeviceFacts {
  int device = 0;      // ordinal
  int num_sms = 0;     // multiprocessors
  int capability = 0;  // 10 major + minor: 80, 90
  int l2_bytes = 0;
};

/// Of the calling thread's current device. A few attribute queries, no synchronisation.
DeviceFacts device_facts();

/// Throws qwen1m::Error if a rule of TensorMapSpec does not hold.
TensorMap make_tensor_map(const TensorMapSpec& spec);

struct LaunchConfig {
  const char* name = "";  // of the kernel, for errors
  int64_t blocks = 0;     // 0 launches nothing
  int threads = 0;
  uint32_t shared_bytes = 0;  // dynamic
  int cluster = 1;            // blocks of a cluster; divides `blocks`
  bool dependent = false;     // may start before the kernel in front of it has ended
                              // (wait_for_prior_grid); sm_90
  Stream stream = nullptr;
};

/// Launches a Q1M_KERNEL. The parameters are copied before it returns.
void launch(const void* kernel, const LaunchConfig& config, const void* params);

template <typename Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params) {
  launch(reinterpret_cast<const void*>(kernel), config, static_cast<const void*>(&params));
}

/// Compute capability as in DeviceFacts. Throws qwen1m::Error below 80.
int require_sm80(const char* name);

/// Which of an op's two kernels runs on the current device: 90 on an sm_90, else 80. The
/// environment variable QWEN1M_CUDA_KERNELS=sm80 asks for the sm_80 one everywhere. Throws as
/// require_sm80.
int kernel_architecture(const char* name);

/// Launches a kernel struct written for every architecture from sm_80 on, which says its own shape:
/// `blocks(params)`, `threads(params)`, Smem. It begins with wait_for_prior_grid, in front of every
/// access to memory; so on sm_90 its blocks take their places while the kernel before it ends,
/// which hides the launch: that counts for kernels of a few microseconds, as all are in a decode
/// step. (Elsewhere what runs is sm_80 code, in which the wait is nothing.)
template <typename Kernel>
void launch_after_prior_grid(void (*kernel)(typename Kernel::Params), const char* name,
                             const typename Kernel::Params& params, Stream stream) {
  launch(kernel,
         {.name = name,
          .blocks = Kernel::blocks(params),
          .threads = Kernel::threads(params),
          .shared_bytes = sizeof(typename Kernel::Smem),
          .cluster = cluster_of<Kernel>(),
          .dependent = require_sm80(name) == 90,
          .stream = stream},
         params);
}

}  // namespace qwen1m::arch
