// Accesses of kernels to global memory: order between threads and blocks, and the data itself.

#include <algorithm>
#include <cstring>

#include "arch/arch.h"
#include "arch/emu/global_memory.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

bool is_ordered(const GlobalCell::Access& earlier, int64_t cluster, const Knowledge& knowledge) {
  if (earlier.cluster < 0) return true;
  if (earlier.cluster == cluster) return knowledge.ordered()[earlier.agent] >= earlier.clock;
  if (!knowledge.others) return false;
  const std::vector<uint32_t>* clocks = knowledge.others->find(earlier.cluster);
  return clocks != nullptr && (*clocks)[earlier.agent] >= earlier.clock;
}

std::string describe(const GlobalCell::Access& access) {
  const Simulation& sim = simulation();
  const AgentLayout layout(sim.shape.threads, sim.shape.cluster_size);
  const int64_t block = access.cluster * sim.shape.cluster_size + access.agent / layout.per_block;
  const int local = access.agent % layout.per_block;
  return site_text(site_of(access.site)) + " by block " + std::to_string(block) +
         (local < layout.threads ? ", thread " + std::to_string(local) : ", a bulk copy");
}

struct Here {
  const GlobalAllocation& allocation;
  uint64_t word;
  Site site;
  const char* what;

  void report(const char* kind, const char* reason, const GlobalCell::Access& other) const {
    report_issue(kind, site,
                 std::string(what) + " of '" + allocation.name + "' at byte " +
                     std::to_string(word * 4) + " " + reason + " at " + describe(other),
                 site_text(site_of(other.site)));
  }
};

void note_read(GlobalCell& cell, uint8_t mask, GlobalAccess access, int64_t cluster,
               const Actor& actor, uint16_t site, const Here& here) {
  const bool read_only = access == GlobalAccess::kReadOnly;
  const bool both_atomic = access == GlobalAccess::kAtomicRead && cell.atomic_writer;
  if (cell.writer.cluster >= 0 && (cell.written & mask) != 0 && !both_atomic) {
    if (!is_ordered(cell.writer, cluster, *actor.knowledge)) {
      here.report("global-race", "is not ordered after the write", cell.writer);
    } else if (read_only) {
      here.report("global-read-only", "uses the read-only path for what this launch wrote",
                  cell.writer);
    } else if (actor.async && !cell.async_writer) {
      here.report("proxy-fence", "(async proxy) reads what the generic proxy wrote", cell.writer);
    }
  }
  if (access == GlobalAccess::kAtomicRead) return;  // a later atomic write is no race
  if (read_only) cell.read_only_site = site;
  GlobalCell::Access* place = nullptr;
  for (GlobalCell::Access& reader : cell.readers) {
    const bool same = reader.cluster == cluster && reader.agent == actor.agent;
    if (same || is_ordered(reader, cluster, *actor.knowledge)) place = &reader;
  }
  if (place == nullptr) place = &cell.readers[simulation().random.below(2)];
  *place = {cluster, actor.clock, actor.agent, site};
}

void note_write(GlobalCell& cell, uint8_t mask, bool atomic, int64_t cluster, const Actor& actor,
                uint16_t site, const Here& here) {
  const bool both_atomic = atomic && cell.atomic_writer;
  if ((cell.written & mask) != 0 && !both_atomic &&
      !is_ordered(cell.writer, cluster, *actor.knowledge)) {
    here.report("global-race", "is not ordered after the write", cell.writer);
  }
  for (const GlobalCell::Access& reader : cell.readers) {
    if (!is_ordered(reader, cluster, *actor.knowledge)) {
      here.report("global-race", "is not ordered after the read", reader);
    }
  }
  if (cell.read_only_site != 0) {
    report_issue("global-read-only", here.site,
                 std::string(here.what) + " of '" + here.allocation.name + "' at byte " +
                     std::to_string(here.word * 4) +
                     ", which this launch reads through the read-only path at " +
                     site_text(site_of(cell.read_only_site)),
                 site_text(site_of(cell.read_only_site)));
  }
  const bool same = cell.writer.cluster == cluster && cell.writer.agent == actor.agent &&
                    cell.writer.clock == actor.clock;
  cell.written = same ? static_cast<uint8_t>(cell.written | mask) : mask;
  cell.writer = {cluster, actor.clock, actor.agent, site};
  cell.readers[0] = cell.readers[1] = {};
  cell.atomic_writer = atomic;
  cell.async_writer = actor.async;
}

Thread& self() { return *simulation().running; }

void note_own(GlobalAllocation& allocation, const void* at, uint32_t bytes, GlobalAccess access,
              Site site, const char* what) {
  const Thread& thread = self();
  note_global(allocation, at, bytes, access, thread.block->cluster->index, thread.actor(), site,
              what);
}

/// What the running thread knows, in the form that other clusters keep.
OtherClustersPtr published(const Thread& thread) {
  const Knowledge& knowledge = thread.knowledge;
  auto own = std::make_shared<OtherClusters>();
  own->known.emplace_back(thread.block->cluster->index,
                          std::make_shared<const std::vector<uint32_t>>(
                              knowledge.ordered(), knowledge.ordered() + knowledge.num_agents()));
  return join(OtherClustersPtr(own), knowledge.others);
}

void release(Thread& thread, const void* at, bool keep_earlier) {
  OtherClustersPtr& word = simulation().sync_words[at];
  word = keep_earlier ? join(word, published(thread)) : published(thread);
  thread.tick();
  ++simulation().progress;
}

void acquire(Thread& thread, const void* at) {
  const auto word = simulation().sync_words.find(at);
  if (word == simulation().sync_words.end() || !word->second) return;
  const std::vector<uint32_t>* own = word->second->find(thread.block->cluster->index);
  if (own != nullptr) {
    uint32_t* ordered = thread.knowledge.ordered();
    for (size_t i = 0; i < own->size(); ++i) ordered[i] = std::max(ordered[i], (*own)[i]);
  }
  thread.knowledge.others = join(thread.knowledge.others, word->second);
  ++thread.version;
}

}  // namespace

void note_global(GlobalAllocation& allocation, const void* at, uint64_t bytes, GlobalAccess access,
                 int64_t cluster, const Actor& actor, Site site, const char* what) {
  const bool writes = access == GlobalAccess::kWrite || access == GlobalAccess::kAtomic;
  if (writes && !allocation.writable) {
    report_fatal("global-read-only", site,
                 std::string(what) + " of '" + allocation.name + "', which is not writable");
  }
  // What nobody may write needs no shadow.
  if (!allocation.writable || !simulation().options.check_races) return;
  const uint16_t here = site_index(site);
  const auto offset = static_cast<uint64_t>(static_cast<const uint8_t*>(at) - allocation.base);
  for (uint64_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    uint8_t mask = 0xf;
    if (word * 4 < offset) mask = static_cast<uint8_t>(mask & (0xf << (offset - word * 4)));
    if (word * 4 + 4 > offset + bytes) {
      mask = static_cast<uint8_t>(mask & (0xf >> (word * 4 + 4 - offset - bytes)));
    }
    GlobalCell& cell = allocation.cell(word);
    const Here place{allocation, word, site, what};
    if (writes) {
      note_write(cell, mask, access == GlobalAccess::kAtomic, cluster, actor, here, place);
    } else {
      note_read(cell, mask, access, cluster, actor, here, place);
    }
  }
}

void global_load(void* to, const void* from, uint32_t bytes, GlobalRead path, Site site) {
  const bool read_only = path == GlobalRead::kReadOnly;
  const char* what = read_only ? "global_load" : "global_load_coherent";
  GlobalAllocation& allocation = GlobalMemory::instance().check(from, bytes, bytes, site, what);
  note_own(allocation, from, bytes, read_only ? GlobalAccess::kReadOnly : GlobalAccess::kRead, site,
           what);
  std::memcpy(to, from, bytes);
}

void global_store(void* to, const void* from, uint32_t bytes, Site site) {
  GlobalAllocation& allocation =
      GlobalMemory::instance().check(to, bytes, bytes, site, "global_store");
  note_own(allocation, to, bytes, GlobalAccess::kWrite, site, "global_store");
  std::memcpy(to, from, bytes);
  ++simulation().progress;
}

uint32_t global_load_acquire(const uint32_t* from, Site site) {
  GlobalAllocation& allocation =
      GlobalMemory::instance().check(from, 4, 4, site, "global_load_acquire");
  Simulation& sim = simulation();
  // Kernels poll with it, so others get a turn; and the value may be an old one for a while.
  if (!sim.random.one_in(4)) sim.yield_running();
  acquire(self(), from);
  note_own(allocation, from, 4, GlobalAccess::kAtomicRead, site, "global_load_acquire");
  uint32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

void global_store_release(uint32_t* to, uint32_t value, Site site) {
  GlobalAllocation& allocation =
      GlobalMemory::instance().check(to, 4, 4, site, "global_store_release");
  note_own(allocation, to, 4, GlobalAccess::kAtomic, site, "global_store_release");
  release(self(), to, false);
  std::memcpy(to, &value, 4);
}

uint32_t atomic_add(uint32_t* at, uint32_t value, Site site) {
  GlobalAllocation& allocation = GlobalMemory::instance().check(at, 4, 4, site, "atomic_add");
  Simulation& sim = simulation();
  if (sim.random.one_in(4)) sim.yield_running();
  Thread& thread = self();
  acquire(thread, at);
  note_own(allocation, at, 4, GlobalAccess::kAtomic, site, "atomic_add");
  release(thread, at, true);
  uint32_t old;
  std::memcpy(&old, at, 4);
  const uint32_t sum = old + value;
  std::memcpy(at, &sum, 4);
  return old;
}

void reduce_add(float* at, float value, Site site) {
  GlobalAllocation& allocation = GlobalMemory::instance().check(at, 4, 4, site, "reduce_add");
  note_own(allocation, at, 4, GlobalAccess::kAtomic, site, "reduce_add");
  float sum;
  std::memcpy(&sum, at, 4);
  sum += value;
  std::memcpy(at, &sum, 4);
  ++simulation().progress;
}

void fence_device(Site) { self().tick(); }

}  // namespace qwen1m::arch::emu
