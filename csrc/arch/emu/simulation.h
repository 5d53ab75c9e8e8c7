#pragma once
/// The state of a running launch: threads in warps in blocks in clusters.

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "arch/emu/async_copy.h"
#include "arch/emu/barriers.h"
#include "arch/emu/clock.h"
#include "arch/emu/emulator.h"
#include "arch/emu/fiber.h"
#include "arch/emu/mbarrier.h"
#include "arch/emu/report.h"
#include "arch/emu/shared_memory.h"
#include "arch/emu/warp.h"
#include "arch/emu/wgmma.h"

namespace qwen1m::arch::emu {

inline constexpr int kMaxMbarriers = 64;
inline constexpr int kBulkSlots = 32;  // threads of a block with own clocks for bulk stores

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0xd1b54a32d192ed03) {
    if (state_ == 0) state_ = 1;
  }
  uint32_t next() {  // xorshift
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }
  uint32_t below(uint32_t limit) { return next() % limit; }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

/// Numbers of the agents of a cluster: per block its threads, then the rest.
struct AgentLayout {
  int threads = 0;
  int per_block = 0;
  int total = 0;

  AgentLayout() = default;
  AgentLayout(int threads_per_block, int blocks)
      : threads(threads_per_block), per_block(bulk_write(kBulkSlots)), total(per_block * blocks) {}
  int warpgroup(int i) const { return threads + i; }
  int mbarrier(int i) const { return warpgroup((threads + 127) / 128) + i; }
  int bulk_read(int i) const { return mbarrier(kMaxMbarriers) + i; }
  int bulk_write(int i) const { return bulk_read(kBulkSlots) + i; }
};

/// Where and why a thread does not go on. `detail` is a printf format of the two numbers.
struct Blocked {
  const char* primitive = "start";
  Site site{"", 0};
  const char* detail = "";
  int64_t first = 0;
  int64_t second = 0;
};

struct Thread {
  enum class State { kReady, kBlocked, kDone };

  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  State state = State::kBlocked;
  Blocked blocked;
  bool may_give_up = false;  // blocked in mbarrier_try_wait, which may return false

  uint16_t agent = 0;
  Knowledge knowledge;
  uint32_t version = 0;  // changes with `knowledge`

  WgmmaThread wgmma;
  CopyThread copies;
  uint64_t cluster_arrivals = 0;
  uint64_t cluster_waits = 0;

  uint32_t clock() const { return knowledge.ordered()[agent]; }
  void tick() {
    ++knowledge.ordered()[agent];
    ++version;
  }
  Actor actor() const { return {agent, clock(), &knowledge, false}; }
};

struct Block {
  Block(Cluster& cluster, int64_t index, uint32_t rank, const LaunchShape& shape);

  Cluster* cluster;
  int64_t index;
  uint32_t rank;
  int agent_base;
  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Warpgroup> warpgroups;
  std::unordered_map<uint32_t, MbarrierState> mbarriers;  // by offset
  NamedBarrier named_barriers[16];
  RegisterPool registers;
  int running_threads = 0;
  bool exited = false;
  int bulk_slots_used = 0;
  uint32_t bulk_clocks[kBulkSlots] = {};
  std::vector<IssuedLoad> loads;  // that no thread is known to have waited for
  /// Clock of the last access that threads of other blocks made to this one, by agent.
  std::vector<uint32_t> remote_accesses;

  void note_remote_access(const Thread& by);
};

struct Cluster {
  Cluster(int64_t index, const LaunchShape& shape);

  int64_t index;
  AgentLayout agents;
  std::vector<std::unique_ptr<Block>> blocks;
  ClusterBarrier barrier;
  int running_blocks = 0;
};

/// Numbers the source positions that shadow memory remembers.
class SiteTable {
 public:
  SiteTable() { sites_.push_back({"", 0}); }
  uint16_t index(Site site);
  Site site(uint16_t index) const { return sites_[index]; }

 private:
  static constexpr int kRecent = 256;
  struct Recent {
    uintptr_t key = 0;
    uint16_t index = 0;
  };
  Recent recent_[kRecent];
  std::unordered_map<uintptr_t, uint16_t> indices_;
  std::vector<Site> sites_;
};

class Simulation {
 public:
  Simulation(const LaunchShape& shape, const std::function<void()>& kernel, const Options& options);
  ~Simulation();

  void run();

  /// Suspends the running thread until somebody wakes it.
  void block_running(const Blocked& why);
  /// Lets others go on: the running thread polls for something.
  void yield_running();
  void wake(Thread& thread);

  const LaunchShape shape;
  const std::function<void()>& kernel;
  const Options options;
  Report report;
  Random random;
  SiteTable sites;
  std::set<std::string> reported;
  Thread* running = nullptr;  // null while the scheduler or an asynchronous copy acts
  bool aborting = false;
  std::exception_ptr kernel_exception;  // thrown by the kernel itself
  uint64_t progress = 0;                // events that may let a polling thread go on
  std::vector<std::shared_ptr<CopyOperation>> in_flight;
  /// What an acquire of a word of global memory learns.
  std::unordered_map<const void*, OtherClustersPtr> sync_words;

 private:
  friend void fiber_main();
  void start_cluster();
  void retire_finished_clusters();
  Thread* pick();
  void resume(Thread& thread);
  bool wake_those_who_may_give_up();
  [[noreturn]] void report_deadlock(const char* reason);
  void unwind_all();
  [[noreturn]] void end_thread();
  void check_block_exit(Block& block);

  std::vector<int64_t> waiting_clusters_;  // the next one is the last
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Warp*> warps_;  // of the resident clusters
  size_t round_robin_ = 0;
  uint64_t lowest_priority_ = UINT64_C(1) << 62;
  uint64_t polled_at_progress_ = 0;
  uint64_t polls_ = 0;
  uint64_t gave_up_at_progress_ = UINT64_MAX;
  Fiber scheduler_;
  StackPool stacks_;
};

/// Where every fiber begins and ends.
void fiber_main();
/// The launch that runs, of which there is one in a process.
Simulation& simulation();

std::string thread_text(const Thread& thread);
std::string agent_text(const Cluster& cluster, int agent);

/// Shared addresses. A block's own: kSharedBase + offset. One of map_to_rank: the same in the low
/// 24 bits, rank + 1 above.
inline uint32_t offset_of(uint32_t address) { return (address & 0xffffff) - kSharedBase; }
/// The offset behind an address that must be the running block's own.
uint32_t own_offset(uint32_t address, Site site, const char* what);
/// The block that an address lies in.
Block& block_of(uint32_t address, Site site);

}  // namespace qwen1m::arch::emu
