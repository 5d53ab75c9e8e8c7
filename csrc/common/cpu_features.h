#pragma once
/// Which instruction set the CPU kernels use: the best one that was compiled in, that the processor
/// has and that the operating system allows; QWEN1M_CPU_ISA can only lower it.

#include <cstdint>
#include <optional>
#include <string_view>

namespace qwen1m {

/// Each level contains the ones before it.
enum class CpuIsa : uint8_t {
  kPortable,    // plain C++
  kAvx512,      // AVX-512 F, BW, VL, DQ
  kAvx512Bf16,  // + AVX512_BF16 (vdpbf16ps)
  kAmx,         // + AMX_TILE, AMX_BF16
};

/// "portable", "avx512", "avx512_bf16", "amx": also the values of QWEN1M_CPU_ISA.
const char* cpu_isa_name(CpuIsa);
std::optional<CpuIsa> parse_cpu_isa(std::string_view name);

/// The highest level this binary contains (Q1M_HAVE_AVX512, ... of CMakeLists.txt).
CpuIsa compiled_cpu_isa();
/// The highest level this machine runs. The first call asks Linux for the AMX tile state.
CpuIsa machine_cpu_isa();

/// What `request` (the value of QWEN1M_CPU_ISA, or null) makes of the best level available.
/// Throws qwen1m::Error on an unknown name and on a level above `available`.
CpuIsa choose_cpu_isa(CpuIsa available, const char* request);

/// The level every kernel of this process uses; decided at the first call, throws as
/// choose_cpu_isa.
CpuIsa cpu_isa();

}  // namespace qwen1m
