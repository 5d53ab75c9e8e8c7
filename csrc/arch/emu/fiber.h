#pragma once
/// Cooperative threads: one fiber per emulated CUDA thread, all on the caller's OS thread.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace qwen1m::arch::emu {

/// A suspended flow of control. A default-constructed one stands for the thread that runs main().
struct Fiber {
  void* context = nullptr;   // x86-64: its stack pointer; elsewhere: a ucontext_t
  uint8_t* stack = nullptr;  // lowest usable address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

/// Lays out `fiber` so that the first switch to it calls `entry`, which must never return.
void fiber_start(Fiber& fiber, void (*entry)());
/// First thing `entry` does.
void fiber_entered();
/// Suspends `from` (the running fiber) and continues `to`. With `from_ends`, nobody switches back.
void fiber_switch(Fiber& from, Fiber& to, bool from_ends = false);

/// Stacks with a guard page below, handed out and taken back.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  void give(Fiber& fiber);
  void take_back(Fiber& fiber);

 private:
  std::vector<uint8_t*> free_;
  std::vector<uint8_t*> all_;
};

}  // namespace qwen1m::arch::emu
