#include "arch/emu/barriers.h"

#include <algorithm>

#include "arch/arch.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

/// Arrives at a named barrier. True when this ended the phase.
bool arrive(Thread& thread, NamedBarrier& bar, int id, int threads, Site site) {
  Simulation& sim = simulation();
  if (threads <= 0 || threads % 32 != 0 || threads > sim.shape.threads) {
    report_fatal("named-barrier", site,
                 "barrier " + std::to_string(id) + ": threads is " + std::to_string(threads) +
                     "; expected a multiple of 32 up to the block's " +
                     std::to_string(sim.shape.threads));
  }
  if (bar.arrived == 0) {
    bar.expected = threads;
    bar.first_site = site;
    if (bar.gathering.num_agents() == 0) {
      bar.gathering = Knowledge(thread.block->cluster->agents.total);
    }
    bar.gathering.clear();
    bar.has_arrived.assign(static_cast<size_t>(sim.shape.threads), false);
  }
  if (bar.expected != threads) {
    report_fatal("named-barrier", site,
                 "barrier " + std::to_string(id) + ": threads is " + std::to_string(threads) +
                     "; the phase began with " + std::to_string(bar.expected) + " at " +
                     site_text(bar.first_site));
  }
  if (bar.has_arrived[static_cast<size_t>(thread.index)]) {
    report_fatal("named-barrier", site,
                 "barrier " + std::to_string(id) +
                     ": the thread has arrived in this phase already (begun at " +
                     site_text(bar.first_site) + ")");
  }
  bar.has_arrived[static_cast<size_t>(thread.index)] = true;
  bar.gathering.join(thread.knowledge);
  thread.tick();
  ++sim.progress;
  if (++bar.arrived < bar.expected) return false;
  for (Thread* waiter : bar.waiters) {
    waiter->knowledge.join(bar.gathering);
    ++waiter->version;
    sim.wake(*waiter);
  }
  bar.waiters.clear();
  bar.arrived = 0;
  bar.completed = bar.expected;
  return true;
}

}  // namespace

void named_barrier_sync(int id, int threads, const char* primitive, Site site) {
  Thread& thread = *simulation().running;
  NamedBarrier& bar = thread.block->named_barriers[id];
  if (arrive(thread, bar, id, threads, site)) {
    thread.knowledge.join(bar.gathering);
    ++thread.version;
    return;
  }
  bar.waiters.push_back(&thread);
  simulation().block_running({primitive, site, " on barrier %lld of %lld threads", id, threads});
}

void block_sync(Site site) {
  named_barrier_sync(0, simulation().shape.threads, "block_sync", site);
}

void named_barrier_arrive(int id, int threads, Site site) {
  Thread& thread = *simulation().running;
  arrive(thread, thread.block->named_barriers[id], id, threads, site);
}

void cluster_arrive(Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  Cluster& cluster = *thread.block->cluster;
  ClusterBarrier& bar = cluster.barrier;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    report_fatal("cluster-barrier", site, "second cluster_arrive without a cluster_wait between");
  }
  ++thread.cluster_arrivals;
  if (bar.gathering.num_agents() == 0) {
    bar.gathering = Knowledge(cluster.agents.total);
    bar.released = Knowledge(cluster.agents.total);
  }
  bar.gathering.join(thread.knowledge);
  thread.tick();
  ++sim.progress;
  if (++bar.arrived < sim.shape.threads * sim.shape.cluster_size) return;
  bar.arrived = 0;
  ++bar.phase;
  std::swap(bar.released, bar.gathering);
  bar.gathering.clear();
  for (Thread* waiter : bar.waiters) sim.wake(*waiter);
  bar.waiters.clear();
}

void cluster_wait(Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  ClusterBarrier& bar = thread.block->cluster->barrier;
  if (thread.cluster_arrivals == thread.cluster_waits) {
    report_fatal("cluster-barrier", site, "cluster_wait without a cluster_arrive before it");
  }
  while (bar.phase <= thread.cluster_waits) {
    bar.waiters.push_back(&thread);
    sim.block_running(
        {"cluster_wait", site, " of phase %lld", static_cast<int64_t>(thread.cluster_waits), 0});
  }
  ++thread.cluster_waits;
  thread.knowledge.join(bar.released);
  ++thread.version;
}

}  // namespace qwen1m::arch::emu
