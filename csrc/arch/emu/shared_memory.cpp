#include "arch/emu/shared_memory.h"

#include <cstring>

#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

/// The bytes of the word at `word` that an access touches, one bit each.
uint8_t bytes_of_word(uint32_t word, uint32_t offset, uint32_t bytes) {
  if (bytes >= 4) return 0xf;  // accesses are naturally aligned
  return static_cast<uint8_t>(((1U << bytes) - 1) << (offset - word * 4));
}

}  // namespace

SharedMemory::SharedMemory(uint32_t bytes, const Cluster& cluster)
    : size_(bytes), bytes_(bytes, 0xff), cells_((bytes + 3) / 4), cluster_(cluster) {}

void SharedMemory::check_range(uint32_t offset, uint32_t bytes, uint32_t alignment, Site site,
                               const char* what) const {
  if (static_cast<uint64_t>(offset) + bytes > size_) {
    report_fatal("shared-bounds", site,
                 std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
                     shared_text(offset) + " is outside the " + std::to_string(size_) +
                     " bytes of the launch");
  }
  if (offset % alignment != 0) {
    report_fatal("alignment", site,
                 std::string(what) + " at " + shared_text(offset) + ": the address must be " +
                     std::to_string(alignment) + "-byte aligned");
  }
}

std::string SharedMemory::describe(uint32_t word, const Access& access) const {
  return shared_text(word * 4) + ", " +
         (access.clock == kNotYetOrdered ? "cp.async at " : "accessed at ") +
         site_text(site_of(access.site)) + " by " + agent_text(cluster_, access.agent);
}

void SharedMemory::add_reader(Cell& cell, const Actor& actor, uint16_t site) {
  const uint32_t* ordered = actor.knowledge->ordered();
  int place = 0;
  while (place < cell.num_readers && cell.readers[place].agent != actor.agent &&
         ordered[cell.readers[place].agent] < cell.readers[place].clock) {
    ++place;
  }
  if (place == kReaders) {
    place = static_cast<int>(simulation().random.below(kReaders));
  } else if (place == cell.num_readers) {
    ++cell.num_readers;
  }
  cell.readers[place] = {actor.clock, actor.agent, site};
}

void SharedMemory::note_read(uint32_t offset, uint32_t bytes, const Actor& actor, Site site,
                             const char* what) {
  const Options& options = simulation().options;
  if (!options.check_races && !options.check_uninitialised) return;
  const uint16_t here = site_index(site);
  const Knowledge& knowledge = *actor.knowledge;
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Cell& cell = cells_[word];
    const uint8_t mask = bytes_of_word(word, offset, bytes);
    if (cell.is_mbarrier) {
      report_issue("mbarrier-overlap", site,
                   std::string(what) + " reads a live mbarrier at " + shared_text(word * 4));
      continue;
    }
    if ((cell.initialised & mask) != mask) {
      if (options.check_uninitialised) {
        report_issue(
            "uninitialised", site,
            std::string(what) + " reads " + shared_text(word * 4) + ", which nothing has written");
      }
      continue;
    }
    if (!options.check_races) continue;
    if ((cell.written & mask) != 0) {
      if (knowledge.ordered()[cell.writer.agent] < cell.writer.clock) {
        report_issue(
            "race-read-after-write", site,
            std::string(what) + " is not ordered after the write of " + describe(word, cell.writer),
            site_text(site_of(cell.writer.site)));
      } else if (actor.async && !cell.async_writer &&
                 knowledge.fenced()[cell.writer.agent] < cell.writer.clock) {
        report_issue("proxy-fence", site,
                     std::string(what) + " (async proxy) reads what was written through the " +
                         "generic proxy, and the writer executed no fence_proxy_async after it: " +
                         describe(word, cell.writer),
                     site_text(site_of(cell.writer.site)));
      }
    }
    add_reader(cell, actor, here);
  }
}

void SharedMemory::note_write(uint32_t offset, uint32_t bytes, const Actor& actor, Site site,
                              const char* what) {
  const Options& options = simulation().options;
  if (!options.check_races && !options.check_uninitialised) return;
  const uint16_t here = site_index(site);
  const Knowledge& knowledge = *actor.knowledge;
  for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Cell& cell = cells_[word];
    const uint8_t mask = bytes_of_word(word, offset, bytes);
    if (cell.is_mbarrier) {
      report_issue("mbarrier-overlap", site,
                   std::string(what) + " overwrites a live mbarrier at " + shared_text(word * 4));
      continue;
    }
    if (options.check_races) {
      if ((cell.written & mask) != 0) {
        if (knowledge.ordered()[cell.writer.agent] < cell.writer.clock) {
          report_issue("race-write-after-write", site,
                       std::string(what) + " is not ordered after the write of " +
                           describe(word, cell.writer),
                       site_text(site_of(cell.writer.site)));
        } else if (actor.async && !cell.async_writer &&
                   knowledge.fenced()[cell.writer.agent] < cell.writer.clock) {
          report_issue("proxy-fence", site,
                       std::string(what) + " (async proxy) overwrites what was written through " +
                           "the generic proxy, and the writer executed no fence_proxy_async " +
                           "after it: " + describe(word, cell.writer),
                       site_text(site_of(cell.writer.site)));
        }
      }
      for (int i = 0; i < cell.num_readers; ++i) {
        const Access& reader = cell.readers[i];
        if (knowledge.ordered()[reader.agent] < reader.clock) {
          report_issue("race-write-after-read", site,
                       std::string(what) + " is not ordered after the read of " +
                           describe(word, reader) + ", which may still go on",
                       site_text(site_of(reader.site)));
        }
      }
    }
    const bool same = cell.writer.agent == actor.agent && cell.writer.clock == actor.clock;
    cell.written = same ? static_cast<uint8_t>(cell.written | mask) : mask;
    cell.initialised |= mask;
    cell.writer = {actor.clock, actor.agent, here};
    cell.async_writer = actor.async;
    cell.num_readers = 0;
  }
}

void SharedMemory::order_writes(uint32_t offset, uint32_t bytes, uint16_t agent, uint32_t clock) {
  for (uint32_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    Access& writer = cells_[word].writer;
    if (writer.agent == agent && writer.clock == kNotYetOrdered) writer.clock = clock;
  }
}

void SharedMemory::note_mbarrier(uint32_t offset) {
  for (uint32_t word = offset / 4; word < offset / 4 + 2; ++word) cells_[word].is_mbarrier = true;
}

}  // namespace qwen1m::arch::emu
