#pragma once
/// Barriers of threads: named barriers of a block and the barrier of a cluster.

#include <cstdint>
#include <vector>

#include "arch/emu/clock.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct Thread;

struct NamedBarrier {
  int expected = 0;   // threads of the phase under way, or of the last one
  int completed = 0;  // threads of the last phase that ended
  int arrived = 0;
  Knowledge gathering;
  std::vector<Thread*> waiters;
  std::vector<bool> has_arrived;  // by thread of the block
  Site first_site{"", 0};
};

struct ClusterBarrier {
  int arrived = 0;
  uint64_t phase = 0;
  Knowledge gathering;
  Knowledge released;
  std::vector<Thread*> waiters;
};

}  // namespace qwen1m::arch::emu
