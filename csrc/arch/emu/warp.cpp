#include "arch/emu/warp.h"

#include <cstring>

#include "arch/arch.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

void reallocate(int count, bool increase, Site site) {
  Simulation& sim = simulation();
  const char* primitive = increase ? "registers_increase" : "registers_decrease";
  collective(primitive, nullptr, site, [] {});
  Thread& thread = *sim.running;
  Warp& warp = *thread.warp;
  if (thread.lane == 0) {
    if (increase ? count < warp.registers : count > warp.registers) {
      report_issue("registers", site,
                   std::string(primitive) + " to " + std::to_string(count) +
                       " registers, but the warp has " + std::to_string(warp.registers));
    }
    RegisterPool& pool = warp.block->registers;
    const int needed = (count - warp.registers) * 32;
    while (needed > pool.free) {
      pool.waiters.push_back(&thread);
      sim.block_running(
          {primitive, site, ": %lld registers needed, %lld free in the block", needed, pool.free});
    }
    pool.free -= needed;
    warp.registers = count;
    ++warp.reallocations;
    ++sim.progress;
    for (Thread* waiter : pool.waiters) sim.wake(*waiter);
    pool.waiters.clear();
  }
  collective(primitive, nullptr, site, [] {});  // nobody goes on before the warp has its registers
}

}  // namespace

bool join_collective(const char* primitive, void* argument, Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  Warp& warp = *thread.warp;
  if (warp.arrived == 0) {
    warp.primitive = primitive;
    warp.site = site;
  } else if (std::strcmp(warp.primitive, primitive) != 0 || warp.site.line != site.line ||
             std::strcmp(warp.site.file, site.file) != 0) {
    report_fatal("divergence", site,
                 std::string(primitive) + " while other lanes of the warp wait in " +
                     warp.primitive + " at " + site_text(warp.site));
  }
  warp.arrived |= 1U << thread.lane;
  warp.arguments[thread.lane] = argument;
  if (warp.arrived == kAllLanes) return true;
  sim.block_running({primitive, site, "", 0, 0});
  return false;
}

void finish_collective() {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  Warp& warp = *thread.warp;
  warp.arrived = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lane == thread.lane) continue;
    sim.wake(*warp.block->threads[static_cast<size_t>(warp.index * 32 + lane)]);
  }
}

void warp_sync(Site site) {
  collective("warp_sync", nullptr, site, [] {
    const Warp& warp = *simulation().running->warp;
    Thread* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      lanes[lane] = warp.block->threads[static_cast<size_t>(warp.index * 32 + lane)].get();
    }
    Knowledge all = lanes[0]->knowledge;
    for (Thread* lane : lanes) all.join(lane->knowledge);
    for (Thread* lane : lanes) {
      lane->knowledge = all;
      lane->tick();
    }
  });
}

bool elect_one(Site site) {
  collective("elect_one", nullptr, site, [] {});
  const Thread& thread = *simulation().running;
  return thread.lane == thread.warp->leader;
}

uint32_t shuffle(uint32_t value, int source_lane, const char* primitive, Site site) {
  struct Argument {
    uint32_t value;
    int source_lane;
    uint32_t result;
  };
  Argument argument{value, source_lane & 31, 0};
  collective(primitive, &argument, site, [] {
    void** arguments = simulation().running->warp->arguments;
    for (int lane = 0; lane < 32; ++lane) {
      auto& mine = *static_cast<Argument*>(arguments[lane]);
      mine.result = static_cast<Argument*>(arguments[mine.source_lane])->value;
    }
  });
  return argument.result;
}

void registers_decrease(int count, Site site) { reallocate(count, false, site); }
void registers_increase(int count, Site site) { reallocate(count, true, site); }

}  // namespace qwen1m::arch::emu
