// A launch: its shape, its clusters one after the other, and what a block must not leave behind.

#include <algorithm>
#include <mutex>

#include "arch/arch.h"
#include "arch/emu/global_memory.h"
#include "arch/emu/simulation.h"
#include "qwen1m/error.h"

namespace qwen1m::arch::emu {
namespace {

Simulation* g_simulation = nullptr;

void require(bool ok, const char* argument, const char* expected, int64_t got) {
  if (ok) return;
  throw Error(std::string("launch: ") + argument + ": expected " + expected + ", got " +
              std::to_string(got));
}

Thread& self() { return *simulation().running; }

}  // namespace

Simulation& simulation() { return *g_simulation; }

Block::Block(Cluster& cluster_of_block, int64_t block_index, uint32_t block_rank,
             const LaunchShape& shape)
    : cluster(&cluster_of_block),
      index(block_index),
      rank(block_rank),
      agent_base(static_cast<int>(block_rank) * cluster_of_block.agents.per_block),
      shared(shape.shared_bytes, cluster_of_block),
      warpgroups(static_cast<size_t>((shape.threads + 127) / 128)),
      running_threads(shape.threads),
      remote_accesses(static_cast<size_t>(cluster_of_block.agents.total)) {}

void Block::note_remote_access(const Thread& by) {
  uint32_t& last = remote_accesses[by.agent];
  last = std::max(last, by.clock());
}

Cluster::Cluster(int64_t cluster_index, const LaunchShape& shape)
    : index(cluster_index),
      agents(shape.threads, shape.cluster_size),
      running_blocks(shape.cluster_size) {
  for (int rank = 0; rank < shape.cluster_size; ++rank) {
    blocks.push_back(std::make_unique<Block>(*this, cluster_index * shape.cluster_size + rank,
                                             static_cast<uint32_t>(rank), shape));
  }
}

Simulation::Simulation(const LaunchShape& launch_shape, const std::function<void()>& launch_kernel,
                       const Options& launch_options)
    : shape(launch_shape),
      kernel(launch_kernel),
      options(launch_options),
      random(launch_options.seed) {
  const int64_t clusters = shape.blocks / shape.cluster_size;
  for (int64_t i = clusters - 1; i >= 0; --i) waiting_clusters_.push_back(i);
  if (options.schedule == Schedule::kFifo) return;
  // The hardware promises no order of blocks.
  for (size_t i = waiting_clusters_.size(); i > 1; --i) {
    std::swap(waiting_clusters_[i - 1], waiting_clusters_[random.below(static_cast<uint32_t>(i))]);
  }
}

Simulation::~Simulation() = default;

void Simulation::start_cluster() {
  resident_.push_back(std::make_unique<Cluster>(waiting_clusters_.back(), shape));
  waiting_clusters_.pop_back();
  Cluster& cluster = *resident_.back();
  const int registers = options.registers_at_launch != 0
                            ? options.registers_at_launch
                            : std::min(255, 65536 / shape.threads) / 8 * 8;
  for (const auto& block : cluster.blocks) {
    for (int i = 0; i < shape.threads; ++i) {
      if (i % 32 == 0) {
        auto warp = std::make_unique<Warp>();
        warp->index = i / 32;
        warp->block = block.get();
        warp->priority = (UINT64_C(1) << 62) + random.next();
        warp->leader = static_cast<int>(random.below(32));
        warp->registers = registers;
        warps_.push_back(warp.get());
        block->warps.push_back(std::move(warp));
      }
      auto thread = std::make_unique<Thread>();
      thread->block = block.get();
      thread->warp = block->warps.back().get();
      thread->index = i;
      thread->lane = i % 32;
      thread->agent = static_cast<uint16_t>(block->agent_base + i);
      thread->knowledge = Knowledge(cluster.agents.total);
      thread->knowledge.ordered()[thread->agent] = 1;
      stacks_.give(thread->fiber);
      fiber_start(thread->fiber, &fiber_main);
      wake(*thread);
      block->threads.push_back(std::move(thread));
    }
  }
}

void Simulation::check_block_exit(Block& block) {
  if (!options.check_races) return;
  // A block's shared memory is gone once all its threads are: what others did to it must be ordered
  // before the last of them.
  Knowledge known = block.threads[0]->knowledge;
  for (const auto& thread : block.threads) known.join(thread->knowledge);
  for (const IssuedLoad& load : block.loads) {
    if (known.ordered()[load.agent] >= load.clock) continue;
    report_issue("exit-in-flight", load.site,
                 "block " + std::to_string(block.index) +
                     " exits without having waited for this copy into its shared memory");
  }
  for (size_t agent = 0; agent < block.remote_accesses.size(); ++agent) {
    if (known.ordered()[agent] >= block.remote_accesses[agent]) continue;
    report_issue("cluster-exit", {"(exit)", 0},
                 "block " + std::to_string(block.index) + " may exit before " +
                     agent_text(*block.cluster, static_cast<int>(agent)) +
                     " has arrived on one of its barriers or copied to it");
  }
  for (const auto& [offset, bar] : block.mbarriers) {
    if (bar.tx_bytes == 0) continue;
    report_issue("mbarrier-bytes", bar.init_site,
                 "block " + std::to_string(block.index) + " exits while its mbarrier " +
                     shared_text(offset) + " has " + std::to_string(bar.tx_bytes) +
                     " bytes missing");
  }
  for (int id = 0; id < 16; ++id) {
    // Arrivals may be left over, but not because phases disagreed about their number.
    const NamedBarrier& bar = block.named_barriers[id];
    if (bar.arrived == 0 || bar.completed == 0 || bar.completed == bar.expected) continue;
    report_issue("named-barrier", bar.first_site,
                 "block " + std::to_string(block.index) + " exits with arrivals on barrier " +
                     std::to_string(id) + " for " + std::to_string(bar.expected) +
                     " threads; the phase before was for " + std::to_string(bar.completed));
  }
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    if (block.warps[warp]->reallocations == block.warps[warp / 4 * 4]->reallocations) continue;
    report_issue("registers", {"(exit)", 0},
                 "not all warps of warpgroup " + std::to_string(warp / 4) + " of block " +
                     std::to_string(block.index) +
                     " executed registers_decrease and registers_increase");
  }
}

void Simulation::retire_finished_clusters() {
  for (auto& cluster : resident_) {
    for (auto& block : cluster->blocks) {
      if (block->exited || std::any_of(block->threads.begin(), block->threads.end(),
                                       [](auto& t) { return t->state != Thread::State::kDone; })) {
        continue;
      }
      block->exited = true;
      --cluster->running_blocks;
      check_block_exit(*block);
    }
  }
  for (auto& cluster : resident_) {
    if (cluster->running_blocks != 0) continue;
    // Its copies end with it: they point into its blocks.
    for (size_t i = in_flight.size(); i-- > 0;) {
      while (i < in_flight.size() && in_flight[i]->block->cluster == cluster.get()) step_copy(i);
    }
    std::erase_if(warps_, [&](const Warp* warp) { return warp->block->cluster == cluster.get(); });
    for (auto& block : cluster->blocks) {
      for (auto& thread : block->threads) stacks_.take_back(thread->fiber);
    }
  }
  std::erase_if(resident_, [](const auto& cluster) { return cluster->running_blocks == 0; });
}

Report launch(const LaunchShape& shape, const std::function<void()>& kernel,
              const Options& options) {
  require(shape.threads >= 32 && shape.threads <= 1024 && shape.threads % 32 == 0, "threads",
          "a multiple of 32 up to 1,024", shape.threads);
  require(shape.cluster_size >= 1 && shape.cluster_size <= 8, "cluster_size", "1 to 8",
          shape.cluster_size);
  require(shape.blocks >= 1 && shape.blocks % shape.cluster_size == 0 && shape.blocks <= INT32_MAX,
          "blocks", "a multiple of the cluster size from 1 to 2^31 - 1", shape.blocks);
  require(shape.shared_bytes <= kMaxSharedBytesSm90, "shared_bytes", "at most 232448",
          shape.shared_bytes);
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  GlobalMemory::instance().forget_accesses();
  Simulation sim(shape, kernel, options);
  g_simulation = &sim;
  sim.run();
  g_simulation = nullptr;
  if (sim.kernel_exception) std::rethrow_exception(sim.kernel_exception);
  return std::move(sim.report);
}

// --- Addresses, identity, plain shared memory --------------------------------------------------

uint32_t own_offset(uint32_t address, Site site, const char* what) {
  if (address >> 24 != 0) {
    report_fatal("shared-window", site,
                 std::string(what) +
                     " got an address of map_to_rank; only "
                     "mbarrier_arrive_remote and shared_load_remote take one");
  }
  return offset_of(address);
}

Block& block_of(uint32_t address, Site site) {
  Block& own = *self().block;
  const uint32_t window = address >> 24;
  if (window == 0) return own;
  const auto& blocks = own.cluster->blocks;
  if (window > blocks.size()) {
    report_fatal("shared-window", site,
                 "rank is " + std::to_string(window - 1) + "; expected less than the " +
                     std::to_string(blocks.size()) + " blocks of the cluster");
  }
  return *blocks[window - 1];
}

uint32_t shared_base() { return kSharedBase; }
uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  return (address & 0xffffff) | (rank + 1) << 24;
}

void shared_load(void* to, uint32_t address, uint32_t bytes, Site site) {
  Thread& thread = self();
  SharedMemory& shared = thread.block->shared;
  const uint32_t offset = own_offset(address, site, "shared_load");
  shared.check_range(offset, bytes, bytes, site, "shared_load");
  shared.note_read(offset, bytes, thread.actor(), site, "shared_load");
  std::copy_n(shared.at(offset), bytes, static_cast<uint8_t*>(to));
}

void shared_load_remote(void* to, uint32_t address, uint32_t bytes, Site site) {
  Thread& thread = self();
  Block& block = block_of(address, site);
  if (&block != thread.block) {
    if (block.exited) {
      report_fatal("cluster-exit", site,
                   "reads shared memory of block " + std::to_string(block.index) +
                       " of the cluster, which has exited");
    }
    block.note_remote_access(thread);
  }
  const uint32_t offset = offset_of(address);
  block.shared.check_range(offset, bytes, bytes, site, "shared_load_remote");
  block.shared.note_read(offset, bytes, thread.actor(), site, "shared_load_remote");
  std::copy_n(block.shared.at(offset), bytes, static_cast<uint8_t*>(to));
}

void shared_store(uint32_t address, const void* from, uint32_t bytes, Site site) {
  Thread& thread = self();
  SharedMemory& shared = thread.block->shared;
  const uint32_t offset = own_offset(address, site, "shared_store");
  shared.check_range(offset, bytes, bytes, site, "shared_store");
  shared.note_write(offset, bytes, thread.actor(), site, "shared_store");
  std::copy_n(static_cast<const uint8_t*>(from), bytes, shared.at(offset));
}

void fence_proxy_async(Site) {
  // The writer's fence: what this thread wrote so far.
  Thread& thread = self();
  thread.knowledge.fenced()[thread.agent] = thread.clock();
  thread.tick();
}

int thread_index() { return self().index; }
int64_t block_index() { return self().block->index; }
int64_t num_blocks() { return simulation().shape.blocks; }
uint32_t cluster_rank() { return self().block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(simulation().shape.cluster_size); }

}  // namespace qwen1m::arch::emu
