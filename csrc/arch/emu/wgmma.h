#pragma once
/// Warpgroup matrix multiplication: issued by 128 threads, carried out later, in order.

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "arch/arch.h"
#include "arch/emu/clock.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct Block;
struct Thread;

/// An accumulator tile of 64 x n while wgmmas on it are in flight.
struct AccumulatorTile {
  int n;
  std::vector<float> values;
};

struct WgmmaOperation {
  WgmmaCall call{};  // d and a_registers are the first thread's
  Site site{"", 0};
  std::shared_ptr<AccumulatorTile> tile;
  int issued_by = 0;
  int retired_by = 0;
  bool executed = false;
  // With A in registers: the operand, and what each thread's registers held.
  std::vector<float> a_tile;
  std::vector<const uint32_t*> a_pointers;
  std::vector<uint32_t> a_values;
};

struct Warpgroup {
  std::deque<std::unique_ptr<WgmmaOperation>> operations;  // not retired by all threads yet
  uint64_t first = 0;                                      // number of operations.front()
  std::vector<Thread*> waiters;
  // What all four warps know, each through any of its lanes; valid for `version_sum`.
  Knowledge common;
  uint64_t version_sum = UINT64_MAX;
};

struct WgmmaThread {
  struct InFlight {
    float* d;
    int count;
    std::shared_ptr<AccumulatorTile> tile;
    uint64_t last;  // newest operation on it
  };
  struct Fenced {
    const uint8_t* registers;
    std::vector<uint8_t> values;
  };
  uint64_t issued = 0;
  uint64_t retired = 0;
  std::deque<uint64_t> commits;  // operations issued when each pending group was closed
  std::vector<InFlight> in_flight;
  std::vector<Fenced> fenced;
};

/// Row and column of accumulator register i of thread t of the warpgroup.
inline int accumulator_row(int t, int i) { return 16 * (t / 32) + (t % 32) / 4 + 8 * (i >> 1 & 1); }
inline int accumulator_column(int t, int i) { return 8 * (i >> 2) + 2 * (t % 4) + (i & 1); }

/// Reports what the operands in shared memory race with, for `actor` reading them.
void note_operands(Block& block, const WgmmaOperation& operation, const Actor& actor);
/// Computes tile = a b (+ tile).
void execute(Block& block, WgmmaOperation& operation);

void check_wgmma_at_exit(const Thread& thread);

}  // namespace qwen1m::arch::emu
