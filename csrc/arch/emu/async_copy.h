#pragma once
/// Copies that land later: TMA, bulk copies, cp.async.

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "arch/emu/report.h"
#include "arch/emu/tensor_map.h"

namespace qwen1m::arch::emu {

struct Block;
struct Thread;

/// One bulk copy, with a tensor map or without. A multicast load is one for each destination.
struct CopyOperation {
  enum class State { kIssued, kSourceRead, kDone };

  bool is_store = false;
  bool is_tensor = false;
  State state = State::kIssued;
  Site site{"", 0};
  Block* block = nullptr;  // whose shared memory it reads or writes
  uint32_t offset = 0;     // in it
  uint32_t bytes = 0;
  EncodedMap map{};  // with is_tensor
  Coordinates5 at{};
  uint8_t* global = nullptr;  // without
  uint32_t rows_done = 0;     // of a tensor load, which may land in parts
  uint32_t bar_offset = 0;    // of a load
  uint64_t bar_phase = 0;
  std::vector<uint8_t> data;  // of a store, once the source has been read
  // Of a store: who it is for the shadows.
  int64_t cluster = 0;
  uint32_t clock = 0;
};

using CopyGroup = std::vector<std::shared_ptr<CopyOperation>>;

struct CpAsync {
  uint32_t offset;
  const void* from;  // null: zeros
};

/// A load into a block's shared memory, complete for whoever knows the agent's clock.
struct IssuedLoad {
  uint16_t agent;
  uint32_t clock;
  Site site;
};

/// Copies of a thread that it has not waited for.
struct CopyThread {
  int bulk_slot = -1;
  CopyGroup open_stores;
  std::deque<CopyGroup> stores;  // committed, not complete
  size_t stores_read = 0;        // of these, how many have been waited for with .read
  std::vector<CpAsync> open_cp_async;
  std::deque<std::vector<CpAsync>> cp_async;
};

/// Lets one copy make a step; the scheduler calls it at random times.
void step_copy(size_t index_in_flight);
/// Complains about copies that a thread leaves behind.
void check_copies_at_exit(const Thread& thread);

}  // namespace qwen1m::arch::emu
