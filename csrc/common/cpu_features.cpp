#include "common/cpu_features.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "qwen1m/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qwen1m {
namespace {

constexpr const char* kNames[] = {"portable", "avx512", "avx512_bf16", "amx"};

/// Tile data is 8 KiB per thread, so Linux gives it only to processes that ask
/// (arch_prctl(2), Documentation/arch/x86/xstate.rst). The permission holds for all threads.
[[maybe_unused]] bool request_amx_tile_state() {
#if defined(__linux__) && defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr long kReqXcompPerm = 0x1023;
  constexpr long kXtileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These built-ins also check that the operating system saves the ZMM state (XCR0).
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return CpuIsa::kPortable;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // CPUID.7.0:EDX
  const bool has_amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
                       (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0;
  return has_amx && request_amx_tile_state() ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
#else
  return CpuIsa::kPortable;
#endif
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) { return kNames[static_cast<size_t>(isa)]; }

std::optional<CpuIsa> parse_cpu_isa(std::string_view name) {
  for (uint8_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<CpuIsa>(i);
  }
  return std::nullopt;
}

CpuIsa compiled_cpu_isa() {
#if Q1M_HAVE_AMX
  return CpuIsa::kAmx;
#elif Q1M_HAVE_AVX512BF16
  return CpuIsa::kAvx512Bf16;
#elif Q1M_HAVE_AVX512
  return CpuIsa::kAvx512;
#else
  return CpuIsa::kPortable;
#endif
}

CpuIsa machine_cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

CpuIsa choose_cpu_isa(CpuIsa available, const char* request) {
  if (request == nullptr || *request == '\0') return available;
  const std::optional<CpuIsa> wanted = parse_cpu_isa(request);
  if (!wanted) {
    throw Error(
        std::string("QWEN1M_CPU_ISA: expected portable, avx512, avx512_bf16 or amx, got '") +
        request + "'");
  }
  if (*wanted > available) {
    throw Error(std::string("QWEN1M_CPU_ISA: ") + request +
                " is not available here: this machine and this build go up to " +
                cpu_isa_name(available) + "; unset it or lower it");
  }
  return *wanted;
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa(std::min(compiled_cpu_isa(), machine_cpu_isa()),
                                           std::getenv("QWEN1M_CPU_ISA"));
  return isa;
}

}  // namespace qwen1m
