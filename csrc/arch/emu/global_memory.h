#pragma once
/// Global memory: what kernels may touch, and who of a launch touched it.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "arch/emu/clock.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

/// Last accesses to 4 bytes of global memory in the running launch.
struct GlobalCell {
  struct Access {
    int64_t cluster = -1;  // -1: none
    uint32_t clock = 0;
    uint16_t agent = 0;
    uint16_t site = 0;
  };
  Access writer;
  Access readers[2];            // more concurrent readers of one word are sampled
  uint16_t read_only_site = 0;  // of a global_load through the read-only path
  uint8_t written = 0;          // the bytes that `writer` wrote, one bit each
  bool atomic_writer = false;
  bool async_writer = false;
};

struct GlobalAllocation {
  static constexpr uint64_t kPageWords = 256;
  struct Page {
    GlobalCell cells[kPageWords];
  };

  uint8_t* base = nullptr;
  size_t bytes = 0;
  std::string name;
  bool writable = true;
  size_t mapped_bytes = 0;  // by mmap; 0: on the heap or the host's
  bool is_ours = false;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> shadow;  // sparse: touched pages only

  GlobalCell& cell(uint64_t word);
};

/// All allocations of the process.
class GlobalMemory {
 public:
  static GlobalMemory& instance();

  void add(GlobalAllocation allocation);
  void remove(const void* base);
  /// The allocation that holds the byte at `at`, or null.
  GlobalAllocation* find(const void* at);
  /// The one of [at, at + bytes); ends the launch if there is none or `at` is not aligned.
  GlobalAllocation& check(const void* at, uint64_t bytes, uint32_t alignment, Site site,
                          const char* what);
  /// A launch begins: nobody has touched anything.
  void forget_accesses();

 private:
  std::map<uintptr_t, GlobalAllocation> allocations_;
  GlobalAllocation* recent_ = nullptr;
};

enum class GlobalAccess { kReadOnly, kRead, kAtomicRead, kWrite, kAtomic };
/// An access by `actor` of `cluster`: reports what it races with and remembers it.
void note_global(GlobalAllocation& allocation, const void* at, uint64_t bytes, GlobalAccess access,
                 int64_t cluster, const Actor& actor, Site site, const char* what);

}  // namespace qwen1m::arch::emu
