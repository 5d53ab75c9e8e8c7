#pragma once
/// One kernel per primitive, named after it: test_primitives.py compiles them and reads which
/// instruction each became. Nothing runs.

#include "arch/arch.h"

namespace arch = qwen1m::arch;
using arch::Mbarrier;
using arch::Shared;
using arch::Vec16;

struct Plan {
  Vec16 tile[512];
  uint32_t words[64];
  Mbarrier bar;
};
struct Arguments {
  arch::TensorMap map;
  float* floats;
  uint32_t* words;
  unsigned char* bytes;
  int number;
  uint32_t parity;
};

#define Q1M_PROBE(name)                                                                            \
  static Q1M_DEVICE void name##_body(const Arguments& p, Shared<Plan> shared,                      \
                                     Shared<Mbarrier> bar, Shared<Vec16> row);                     \
  extern "C" __global__ void __launch_bounds__(128, 1) name(const __grid_constant__ Arguments p) { \
    const auto shared = arch::shared_memory<Plan>();                                               \
    name##_body(p, shared, Q1M_SHARED_MEMBER(shared, bar),                                         \
                Q1M_SHARED_MEMBER(shared, tile)[arch::thread_index()]);                            \
  }                                                                                                \
  static Q1M_DEVICE void name##_body(                                                              \
      [[maybe_unused]] const Arguments& p, [[maybe_unused]] Shared<Plan> shared,                   \
      [[maybe_unused]] Shared<Mbarrier> bar, [[maybe_unused]] Shared<Vec16> row)
