#pragma once
/// The shared memory of one block, with a shadow that knows who last touched each word.

#include <cstdint>
#include <string>
#include <vector>

#include "arch/emu/clock.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct Cluster;

/// Address of offset 0 in the shared window: sm_90 keeps the first 1,024 bytes for itself.
inline constexpr uint32_t kSharedBase = 1024;

class SharedMemory {
 public:
  SharedMemory(uint32_t bytes, const Cluster& cluster);

  uint32_t size() const { return size_; }
  uint8_t* at(uint32_t offset) { return bytes_.data() + offset; }

  /// Ends the launch if [offset, offset + bytes) is not inside, or offset not aligned.
  void check_range(uint32_t offset, uint32_t bytes, uint32_t alignment, Site site,
                   const char* what) const;
  /// An access by `actor`: reports what it races with and remembers it.
  void note_read(uint32_t offset, uint32_t bytes, const Actor& actor, Site site, const char* what);
  void note_write(uint32_t offset, uint32_t bytes, const Actor& actor, Site site, const char* what);
  /// The words that `agent` wrote with kNotYetOrdered are ordered from `clock` on.
  void order_writes(uint32_t offset, uint32_t bytes, uint16_t agent, uint32_t clock);
  /// Makes 8 bytes an mbarrier that ordinary accesses must not touch.
  void note_mbarrier(uint32_t offset);

 private:
  struct Access {
    uint32_t clock = 0;
    uint16_t agent = 0;
    uint16_t site = 0;
  };
  static constexpr int kReaders = 4;  // more concurrent readers of one word are sampled
  struct Cell {                       // of 4 bytes
    Access writer;
    Access readers[kReaders];
    uint8_t num_readers = 0;
    uint8_t initialised = 0;  // one bit per byte
    uint8_t written = 0;      // the bytes that `writer` wrote
    bool async_writer = false;
    bool is_mbarrier = false;
  };

  std::string describe(uint32_t word, const Access& access) const;
  void add_reader(Cell& cell, const Actor& actor, uint16_t site);

  uint32_t size_;
  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
  const Cluster& cluster_;
};

}  // namespace qwen1m::arch::emu
