#pragma once
/// Barrier objects in shared memory.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "arch/emu/clock.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct Thread;
struct Block;

struct MbarrierState {
  int count = 0;
  int pending = 0;
  int64_t tx_bytes = 0;  // still to land; negative when bytes came before they were expected
  uint64_t phase = 0;
  Knowledge gathering;  // what those know who arrived in this phase
  Knowledge released;   // the same of the phase before, which waiters acquire
  std::vector<Thread*> waiters;
  Site init_site{"", 0};
  uint16_t init_agent = 0;
  uint32_t init_clock = 0;
  uint32_t fence_clock = 0;  // of fence_mbarrier_init; 0: none yet
  uint16_t agent = 0;        // of the copies it counts; phase p completes at clock p + 1
};

/// Who uses a barrier: decides what had to happen after its init.
enum class MbarrierUse { kGeneric, kAsync, kRemote };

/// The barrier at `offset` of `block`, checked for use by the running thread.
MbarrierState& find_mbarrier(Block& block, uint32_t offset, Site site, MbarrierUse use);
/// Bytes of a copy issued in `phase` have landed.
void complete_transaction(Block& block, uint32_t offset, uint64_t phase, uint32_t bytes, Site site);

}  // namespace qwen1m::arch::emu
