#pragma once
/// Warps: what all 32 lanes do together, and register reallocation.

#include <cstdint>
#include <vector>

#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct Thread;
struct Block;

struct Warp {
  int index = 0;  // in the block
  Block* block = nullptr;
  uint32_t ready = 0;  // lanes that can go on
  uint64_t priority = 0;
  int leader = 0;  // the lane that elect_one picks: any, but always the same

  /// The collective operation under way.
  const char* primitive = nullptr;
  Site site{"", 0};
  uint32_t arrived = 0;
  void* arguments[32] = {};

  int registers = 0;  // per thread
  int reallocations = 0;
};

/// Registers of a block that no warp holds, and who waits for some.
struct RegisterPool {
  int free = 0;
  std::vector<Thread*> waiters;
};

/// Brings the 32 lanes together. True in the lane that came last, which then works for all with
/// warp.arguments and calls finish_collective; the others return false after that.
bool join_collective(const char* primitive, void* argument, Site site);
void finish_collective();

template <typename Work>
void collective(const char* primitive, void* argument, Site site, const Work& work) {
  if (!join_collective(primitive, argument, site)) return;
  work();
  finish_collective();
}

}  // namespace qwen1m::arch::emu
