#pragma once
/// The block kernels of attention that this binary has and this machine can run.

#include <string>
#include <vector>

#include "common/attention/block_kernel.h"
#include "inputs.h"

namespace qwen1m::test {

struct NamedKernels {
  std::string name;
  BlockKernels kernels;
};

/// What this binary has for T and this machine can run, up to QWEN1M_CPU_ISA.
template <typename T>
std::vector<NamedKernels> kernels_for_prefill() {
  const DType dtype = dtype_of<T>();
  std::vector<NamedKernels> all{{"portable", portable_kernels(dtype)}};
#if Q1M_HAVE_AVX512
  if (cpu_isa() >= CpuIsa::kAvx512) {
    all.push_back({"avx512", avx512_kernels(dtype)});
    all.push_back({"amx_software_avx512", amx_software_avx512_kernels(dtype)});
  }
#endif
#if Q1M_HAVE_AVX512BF16
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) all.push_back({"avx512_bf16", avx512_bf16_kernels(dtype)});
#endif
#if Q1M_HAVE_AMX
  if (cpu_isa() >= CpuIsa::kAmx) all.push_back({"amx", amx_kernels(dtype)});
#endif
  all.push_back({"amx_software", amx_software_kernels(dtype)});
  std::erase_if(all, [](const NamedKernels& k) { return k.kernels.count == 0; });
  return all;
}

}  // namespace qwen1m::test
