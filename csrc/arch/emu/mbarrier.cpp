#include "arch/emu/mbarrier.h"

#include "arch/arch.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

constexpr int64_t kMaxTransactionBytes = (1 << 20) - 1;

std::string mbarrier_text(const MbarrierState& bar, uint32_t offset) {
  return "mbarrier " + shared_text(offset) + " (init at " + site_text(bar.init_site) + ")";
}

void end_phase_if_complete(MbarrierState& bar) {
  if (bar.pending != 0 || bar.tx_bytes != 0) return;
  // The copies of this phase are complete for whoever sees its end.
  const auto completed = static_cast<uint32_t>(bar.phase + 1);
  bar.gathering.ordered()[bar.agent] = completed;
  bar.gathering.fenced()[bar.agent] = completed;
  std::swap(bar.released, bar.gathering);
  bar.gathering.clear();
  ++bar.phase;
  bar.pending = bar.count;
  ++simulation().progress;
  for (Thread* waiter : bar.waiters) simulation().wake(*waiter);
  bar.waiters.clear();
}

void arrive(Block& block, uint32_t offset, uint32_t expected_bytes, Site site, MbarrierUse use) {
  MbarrierState& bar = find_mbarrier(block, offset, site, use);
  Simulation& sim = simulation();
  bar.tx_bytes += expected_bytes;
  if (bar.tx_bytes > kMaxTransactionBytes) {
    report_issue("mbarrier-bytes", site,
                 mbarrier_text(bar, offset) + " expects " + std::to_string(bar.tx_bytes) +
                     " bytes; the limit is 2^20 - 1");
  }
  bar.gathering.join(sim.running->knowledge);
  sim.running->tick();
  ++sim.progress;
  if (--bar.pending < 0) {
    report_fatal("mbarrier-overarrive", site,
                 "more arrivals than the count " + std::to_string(bar.count) + " in phase " +
                     std::to_string(bar.phase) + " of " + mbarrier_text(bar, offset));
  }
  end_phase_if_complete(bar);
}

/// True when the phase of that parity has ended; the running thread then acquires it.
bool test(MbarrierState& bar, uint32_t parity, Site site) {
  if (parity > 1) {
    report_fatal("mbarrier-invalid", site,
                 "parity is " + std::to_string(parity) + "; expected 0 or 1");
  }
  if ((bar.phase & 1) == parity) return false;
  Thread& thread = *simulation().running;
  thread.knowledge.join(bar.released);
  ++thread.version;
  return true;
}

void suspend(MbarrierState& bar, uint32_t offset, uint32_t parity, const char* primitive,
             Site site) {
  Simulation& sim = simulation();
  bar.waiters.push_back(sim.running);
  sim.block_running({primitive, site, " on shared+%lld, parity %lld", offset, parity});
}

}  // namespace

MbarrierState& find_mbarrier(Block& block, uint32_t offset, Site site, MbarrierUse use) {
  const auto at = block.mbarriers.find(offset);
  if (at == block.mbarriers.end()) {
    report_fatal("mbarrier-invalid", site,
                 "no mbarrier has been initialised at " + shared_text(offset) + " of block " +
                     std::to_string(block.index));
  }
  MbarrierState& bar = at->second;
  if (!simulation().options.check_races) return bar;
  const uint32_t ordered = simulation().running->knowledge.ordered()[bar.init_agent];
  if (ordered < bar.init_clock) {
    report_issue("mbarrier-init-race", site,
                 "used without a barrier after the init of " + mbarrier_text(bar, offset));
  } else if (use != MbarrierUse::kGeneric && (bar.fence_clock == 0 || ordered < bar.fence_clock)) {
    report_issue("proxy-fence", site,
                 std::string(use == MbarrierUse::kAsync ? "given to the async proxy"
                                                        : "used from another block") +
                     " without fence_mbarrier_init after the init of " +
                     mbarrier_text(bar, offset));
  }
  return bar;
}

void complete_transaction(Block& block, uint32_t offset, uint64_t phase, uint32_t bytes,
                          Site site) {
  MbarrierState& bar = block.mbarriers.at(offset);
  if (bar.phase != phase) {
    report_issue("mbarrier-phase", site,
                 "the copy was issued in phase " + std::to_string(phase) + " of " +
                     mbarrier_text(bar, offset) + " and delivers bytes in phase " +
                     std::to_string(bar.phase) +
                     ": fewer bytes were expected than copied, or the barrier was reused early");
  }
  bar.tx_bytes -= bytes;
  ++simulation().progress;
  end_phase_if_complete(bar);
}

void mbarrier_init(uint32_t address, int count, Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  Block& block = *thread.block;
  const uint32_t offset = own_offset(address, site, "mbarrier_init");
  block.shared.check_range(offset, 8, 8, site, "mbarrier_init");
  if (count < 1 || count > kMaxTransactionBytes) {
    report_fatal("mbarrier-invalid", site,
                 "count is " + std::to_string(count) + "; expected 1 to 2^20 - 1");
  }
  if (block.mbarriers.count(offset) != 0) {
    report_fatal("mbarrier-invalid", site,
                 "there is a live mbarrier at " + shared_text(offset) + " already");
  }
  if (block.mbarriers.size() == kMaxMbarriers) {
    report_fatal("emulator-limit", site,
                 "more than " + std::to_string(kMaxMbarriers) + " mbarriers in a block");
  }
  const AgentLayout& agents = block.cluster->agents;
  MbarrierState bar;
  bar.count = bar.pending = count;
  bar.gathering = Knowledge(agents.total);
  bar.released = Knowledge(agents.total);
  bar.init_site = site;
  bar.init_agent = thread.agent;
  bar.init_clock = thread.clock();
  bar.agent = static_cast<uint16_t>(block.agent_base +
                                    agents.mbarrier(static_cast<int>(block.mbarriers.size())));
  block.shared.note_write(offset, 8, thread.actor(), site, "mbarrier_init");
  block.shared.note_mbarrier(offset);
  block.mbarriers.emplace(offset, std::move(bar));
  thread.tick();
}

void fence_mbarrier_init(Site) {
  Thread& thread = *simulation().running;
  for (auto& [offset, bar] : thread.block->mbarriers) {
    if (bar.init_agent == thread.agent && bar.fence_clock == 0) bar.fence_clock = thread.clock();
  }
  thread.tick();
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site) {
  const uint32_t offset = own_offset(address, site, "mbarrier_arrive");
  arrive(*simulation().running->block, offset, expected_bytes, site, MbarrierUse::kGeneric);
}

void mbarrier_arrive_remote(uint32_t address, Site site) {
  Thread& thread = *simulation().running;
  Block& block = block_of(address, site);
  const bool remote = &block != thread.block;
  if (remote) {
    if (block.exited) {
      report_fatal("cluster-exit", site,
                   "arrives on a barrier of block " + std::to_string(block.index) +
                       " of the cluster, which has exited");
    }
    block.note_remote_access(thread);
  }
  arrive(block, offset_of(address), 0, site, remote ? MbarrierUse::kRemote : MbarrierUse::kGeneric);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site) {
  Simulation& sim = simulation();
  const uint32_t offset = own_offset(address, site, "mbarrier_try_wait");
  MbarrierState& bar = find_mbarrier(*sim.running->block, offset, site, MbarrierUse::kGeneric);
  if (sim.options.spurious_failures && sim.random.below(16) == 0) {
    sim.yield_running();
    return false;
  }
  if (test(bar, parity, site)) return true;
  // The hardware suspends the thread for a while; the scheduler wakes it when nothing else runs.
  sim.running->may_give_up = true;
  suspend(bar, offset, parity, "mbarrier_try_wait", site);
  sim.running->may_give_up = false;
  return false;
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  const uint32_t offset = own_offset(address, site, "mbarrier_wait");
  Block& block = *simulation().running->block;
  MbarrierState& bar = find_mbarrier(block, offset, site, MbarrierUse::kGeneric);
  while (!test(bar, parity, site)) suspend(bar, offset, parity, "mbarrier_wait", site);
}

}  // namespace qwen1m::arch::emu
