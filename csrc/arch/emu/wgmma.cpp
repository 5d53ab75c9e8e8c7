#include "arch/emu/wgmma.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

constexpr int kThreads = 128;
constexpr uint32_t kPoison = 0x7fbadbad;  // a NaN: what registers of an accumulator hold in flight

Warpgroup& warpgroup_of(const Thread& thread) {
  return thread.block->warpgroups[static_cast<size_t>(thread.index / kThreads)];
}

bool holds(const void* outer, size_t outer_bytes, const void* inner, size_t inner_bytes) {
  const auto o = reinterpret_cast<uintptr_t>(outer);
  const auto i = reinterpret_cast<uintptr_t>(inner);
  return i >= o && i + inner_bytes <= o + outer_bytes;
}

/// The registers must be listed in a wgmma_fence, and unchanged since.
void check_fence(const Thread& thread, const void* registers, size_t bytes, const char* what,
                 Site site) {
  for (const auto& fenced : thread.wgmma.fenced) {
    if (!holds(fenced.registers, fenced.values.size(), registers, bytes)) continue;
    const auto offset = static_cast<const uint8_t*>(registers) - fenced.registers;
    if (std::memcmp(registers, fenced.values.data() + offset, bytes) != 0) {
      report_issue("wgmma-fence", site,
                   std::string(what) + " registers were written after the wgmma_fence");
    }
    return;
  }
  report_issue("wgmma-fence", site,
               std::string(what) +
                   " registers are not listed in a wgmma_fence since the last "
                   "wgmma_wait on them");
}

void check_poison(const WgmmaThread::InFlight& flight, Site site) {
  for (int i = 0; i < flight.count; ++i) {
    if (std::bit_cast<uint32_t>(flight.d[i]) == kPoison) continue;
    report_issue("wgmma-accumulator", site,
                 "accumulator register " + std::to_string(i) +
                     " was written while a wgmma on it was in flight");
    return;
  }
}

/// The operation that this call belongs to: the first of the 128 threads makes it.
WgmmaOperation& operation_of(Thread& thread, const WgmmaCall& call, Site site) {
  Warpgroup& group = warpgroup_of(thread);
  const uint64_t place = thread.wgmma.issued - group.first;
  if (place == group.operations.size()) {
    auto operation = std::make_unique<WgmmaOperation>();
    operation->call = call;
    operation->site = site;
    if (call.a_registers != nullptr) {
      operation->a_tile.resize(64 * 16);
      operation->a_pointers.resize(kThreads);
      operation->a_values.resize(kThreads * 4);
    }
    group.operations.push_back(std::move(operation));
  }
  WgmmaOperation& operation = *group.operations[place];
  const WgmmaCall& first = operation.call;
  if (first.n != call.n || (first.a_registers == nullptr) != (call.a_registers == nullptr) ||
      first.a != call.a || first.b != call.b || first.major_a != call.major_a ||
      first.major_b != call.major_b || first.accumulate != call.accumulate ||
      operation.site.line != site.line) {
    report_fatal("divergence", site,
                 "threads of the warpgroup disagree about the operands of a wgmma (another one is "
                 "at " +
                     site_text(operation.site) + ")");
  }
  return operation;
}

void take_accumulator(Thread& thread, WgmmaOperation& operation, const WgmmaCall& call, Site site) {
  WgmmaThread& mine = thread.wgmma;
  const int count = call.n / 2;
  const int t = thread.index % kThreads;
  for (auto& flight : mine.in_flight) {
    if (flight.d != call.d) continue;
    check_poison(flight, site);
    if (!operation.tile) operation.tile = flight.tile;
    if (operation.tile != flight.tile) {
      report_fatal("divergence", site,
                   "threads of the warpgroup chain their accumulators differently");
    }
    flight.last = mine.issued;
    return;
  }
  check_fence(thread, call.d, static_cast<size_t>(count) * 4, "accumulator", site);
  if (!operation.tile) {
    operation.tile = std::make_shared<AccumulatorTile>();
    operation.tile->n = call.n;
    operation.tile->values.resize(static_cast<size_t>(64 * call.n));
  }
  for (int i = 0; i < count; ++i) {
    if (call.accumulate) {
      const int at = accumulator_row(t, i) * call.n + accumulator_column(t, i);
      operation.tile->values[static_cast<size_t>(at)] = call.d[i];
    }
    call.d[i] = std::bit_cast<float>(kPoison);
  }
  mine.in_flight.push_back({call.d, count, operation.tile, mine.issued});
}

void take_a_registers(const Thread& thread, WgmmaOperation& operation, const WgmmaCall& call,
                      Site site) {
  check_fence(thread, call.a_registers, 16, "operand A", site);
  const int t = thread.index % kThreads;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = call.a_registers[i];
    const int row = 16 * (t / 32) + (t % 32) / 4 + 8 * (i & 1);
    const int column = 2 * (t % 4) + 8 * (i >> 1);
    const auto at = static_cast<size_t>(row * 16 + column);
    operation.a_tile[at] = bf16_low(pair);
    operation.a_tile[at + 1] = bf16_high(pair);
    operation.a_values[static_cast<size_t>(4 * t + i)] = pair;
  }
  operation.a_pointers[static_cast<size_t>(t)] = call.a_registers;
}

/// What all four warps know. A warp executes as one, so it knows what one of its lanes knows.
const Knowledge& common_knowledge(const Block& block, int warpgroup) {
  Warpgroup& group = const_cast<Block&>(block).warpgroups[static_cast<size_t>(warpgroup)];
  uint64_t version_sum = 0;
  const auto thread_at = [&](int i) -> const Thread& {
    return *block.threads[static_cast<size_t>(warpgroup * kThreads + i)];
  };
  for (int i = 0; i < kThreads; ++i) version_sum += thread_at(i).version;
  if (version_sum == group.version_sum) return group.common;
  group.version_sum = version_sum;
  for (int warp = 0; warp < 4; ++warp) {
    Knowledge known = thread_at(warp * 32).knowledge;
    for (int lane = 1; lane < 32; ++lane) known.join(thread_at(warp * 32 + lane).knowledge);
    if (warp == 0) {
      group.common = std::move(known);
    } else {
      group.common.meet(known);
    }
  }
  return group.common;
}

/// Carries out everything that is complete, up to and including operation `last`.
void execute_up_to(Block& block, Warpgroup& group, uint64_t last) {
  for (uint64_t i = group.first; i <= last && i - group.first < group.operations.size(); ++i) {
    WgmmaOperation& operation = *group.operations[i - group.first];
    if (operation.issued_by < kThreads) return;
    if (!operation.executed) execute(block, operation);
  }
}

/// A group has been waited for: gives the accumulators back that no later wgmma works on.
void return_accumulators(Thread& thread, uint64_t target, const void* const* registers,
                         const size_t* bytes, int count, Site site) {
  WgmmaThread& mine = thread.wgmma;
  const int t = thread.index % kThreads;
  const auto is_listed = [&](const WgmmaThread::InFlight& flight) {
    for (int i = 0; i < count; ++i) {
      if (holds(registers[i], bytes[i], flight.d, static_cast<size_t>(flight.count) * 4)) {
        return true;
      }
    }
    return false;
  };
  for (auto& flight : mine.in_flight) {
    if (flight.last >= target) {
      if (is_listed(flight)) {
        report_issue("wgmma-accumulator", site,
                     "wgmma_wait lists an accumulator on which a wgmma is still in flight");
      }
      continue;
    }
    check_poison(flight, site);
    if (!is_listed(flight)) {
      report_issue("wgmma-wait-list", site,
                   "an accumulator that this wgmma_wait completes is not listed in it");
    }
    for (int i = 0; i < flight.count; ++i) {
      const int at = accumulator_row(t, i) * flight.tile->n + accumulator_column(t, i);
      flight.d[i] = flight.tile->values[static_cast<size_t>(at)];
    }
    // The wgmma wrote them: another batch needs another fence.
    std::erase_if(mine.fenced, [&](const WgmmaThread::Fenced& fenced) {
      return holds(fenced.registers, fenced.values.size(), flight.d, 4);
    });
  }
  std::erase_if(mine.in_flight, [&](const auto& flight) { return flight.last < target; });
}

}  // namespace

void wgmma(const WgmmaCall& call, Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  Block& block = *thread.block;
  const int warpgroup = thread.index / kThreads;
  if ((warpgroup + 1) * kThreads > sim.shape.threads) {
    report_fatal("divergence", site, "wgmma in a warpgroup of fewer than 128 threads");
  }
  Warpgroup& group = warpgroup_of(thread);
  WgmmaOperation& operation = operation_of(thread, call, site);
  take_accumulator(thread, operation, call, site);
  if (call.a_registers != nullptr) take_a_registers(thread, operation, call, site);
  const uint64_t number = thread.wgmma.issued++;
  if (++operation.issued_by < kThreads) return;

  ++sim.report.wgmmas;
  const auto agent =
      static_cast<uint16_t>(block.agent_base + block.cluster->agents.warpgroup(warpgroup));
  note_operands(
      block, operation,
      {agent, static_cast<uint32_t>(number + 1), &common_knowledge(block, warpgroup), true});
  const bool now = sim.options.wgmma == WgmmaExecution::kAtIssue ||
                   (sim.options.wgmma == WgmmaExecution::kRandom && sim.random.one_in(4));
  if (now) execute_up_to(block, group, number);
  for (Thread* waiter : group.waiters) sim.wake(*waiter);
  group.waiters.clear();
}

void wgmma_fence(const void* registers, size_t bytes, Site site) {
  Thread& thread = *simulation().running;
  const auto* begin = static_cast<const uint8_t*>(registers);
  for (const auto& flight : thread.wgmma.in_flight) {
    if (holds(registers, bytes, flight.d, 4)) check_poison(flight, site);
  }
  auto& fenced = thread.wgmma.fenced;
  const auto at = std::find_if(fenced.begin(), fenced.end(),
                               [&](const auto& entry) { return entry.registers == begin; });
  if (at != fenced.end()) {
    at->values.assign(begin, begin + bytes);
  } else {
    fenced.push_back({begin, std::vector<uint8_t>(begin, begin + bytes)});
  }
}

void wgmma_commit() {
  WgmmaThread& mine = simulation().running->wgmma;
  mine.commits.push_back(mine.issued);
}

void wgmma_wait(int pending, const void* const* registers, const size_t* bytes, int count,
                Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  WgmmaThread& mine = thread.wgmma;
  Warpgroup& group = warpgroup_of(thread);
  const auto kept = std::min(mine.commits.size(), static_cast<size_t>(pending));
  const uint64_t target =
      mine.commits.size() == kept ? mine.retired : mine.commits[mine.commits.size() - 1 - kept];
  while (target > mine.retired &&
         group.operations[target - 1 - group.first]->issued_by < kThreads) {
    group.waiters.push_back(&thread);
    sim.block_running(
        {"wgmma_wait", site, ": threads of the warpgroup have not issued the wgmma", 0, 0});
  }
  if (target > mine.retired) execute_up_to(*thread.block, group, target - 1);
  const auto t = static_cast<size_t>(thread.index % kThreads);
  for (uint64_t i = mine.retired; i < target; ++i) {
    WgmmaOperation& operation = *group.operations[i - group.first];
    if (operation.call.a_registers != nullptr &&
        std::memcmp(operation.a_pointers[t], &operation.a_values[4 * t], 16) != 0) {
      report_issue("wgmma-a-registers", operation.site,
                   "operand A registers were written before the wgmma_wait that covers the wgmma");
    }
    ++operation.retired_by;
  }
  return_accumulators(thread, target, registers, bytes, count, site);
  if (target > mine.retired) {
    mine.retired = target;
    const int local = thread.block->cluster->agents.warpgroup(thread.index / kThreads);
    thread.knowledge.ordered()[thread.block->agent_base + local] = static_cast<uint32_t>(target);
    ++thread.version;
  }
  mine.commits.erase(mine.commits.begin(), mine.commits.end() - static_cast<std::ptrdiff_t>(kept));
  while (!group.operations.empty() && group.operations.front()->retired_by == kThreads) {
    group.operations.pop_front();
    ++group.first;
  }
}

void check_wgmma_at_exit(const Thread& thread) {
  const WgmmaThread& mine = thread.wgmma;
  if (mine.issued == mine.retired) return;
  const Warpgroup& group = warpgroup_of(thread);
  report_issue("exit-in-flight", group.operations[mine.retired - group.first]->site,
               "the thread exits without a wgmma_wait that covers this wgmma");
}

}  // namespace qwen1m::arch::emu
