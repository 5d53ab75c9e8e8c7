#pragma once
/// The host's side of the emulator: memory, tensor maps, launches (docs/emulator.md).
///
///   auto* out = static_cast<float*>(emu::allocate_global(bytes, "out"));
///   const emu::Report report = emu::launch({.blocks = 4, .threads = 128, .shared_bytes = 1024},
///                                          [&] { Kernel::run(params); });
///   if (!report.ok()) std::cerr << report.text();

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "arch/arch.h"

namespace qwen1m::arch::emu {

/// Which runnable warp goes on.
enum class Schedule {
  kFifo,      // round robin
  kRandom,    // any
  kPriority,  // the one of the highest priority; priorities are random and change now and then
};
/// When an asynchronous copy lands.
enum class Landing {
  kEager,   // at once
  kLate,    // when nothing else can run, or a wait demands it
  kRandom,  // any time, in parts, out of order
};
/// When the result of a wgmma is computed from shared memory.
enum class WgmmaExecution { kAtIssue, kAtWait, kRandom };

struct Options {
  uint64_t seed = 1;
  Schedule schedule = Schedule::kPriority;
  Landing landing = Landing::kRandom;
  WgmmaExecution wgmma = WgmmaExecution::kRandom;
  bool check_races = true;          // ordering and proxies, in shared and global memory
  bool check_uninitialised = true;  // reads of shared memory that nothing wrote
  bool spurious_failures = true;    // of mbarrier_try_wait
  int max_issues = 12;
  int registers_at_launch = 0;  // per thread; 0: 65,536 / threads, rounded down to a multiple of 8
  int concurrent_clusters = 3;  // that run interleaved; the others wait for a place
};

struct LaunchShape {
  int64_t blocks = 1;
  int threads = 128;  // a multiple of 32, at most 1,024
  int cluster_size = 1;
  uint32_t shared_bytes = 0;
};

struct Issue {
  std::string kind;     // see the table in docs/emulator.md
  std::string message;  // kernel file:line, block, thread, primitive, reason, conflicting access
};

struct Report {
  std::vector<Issue> issues;
  bool completed = false;  // every thread returned from the kernel
  int64_t context_switches = 0;
  int64_t wgmmas = 0;
  int64_t copies = 0;  // bulk and tensor copies
  int64_t copied_bytes = 0;

  bool ok() const { return completed && issues.empty(); }
  bool has(const std::string& kind) const;
  std::string text() const;
};

/// Runs `kernel` once per thread. Throws qwen1m::Error for a shape that no launch could have.
Report launch(const LaunchShape& shape, const std::function<void()>& kernel,
              const Options& options = {});

/// Validates as cuTensorMapEncodeTiled does, and that the tensor lies in one known allocation.
TensorMap make_tensor_map(const TensorMapSpec& spec);

/// Global memory that kernels may touch, filled with 0xff (NaN) and 256-byte aligned.
void* allocate_global(size_t bytes, const std::string& name);
/// The same without a page of memory until it is touched, for views beyond 2^31 elements: zeros.
void* allocate_global_lazily(size_t bytes, const std::string& name);
void free_global(void* memory);
/// Lets kernels touch a buffer of the host's.
void register_global(const void* memory, size_t bytes, const std::string& name, bool writable);
void unregister_global(const void* memory);

}  // namespace qwen1m::arch::emu
