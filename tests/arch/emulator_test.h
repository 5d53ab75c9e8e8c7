#pragma once
/// Tests of the emulator: a small kernel, once right and once with each error that must be caught.

#include <sstream>
#include <string>

#include "arch/emu/emulator.h"
#include "cpp/test.h"

namespace qwen1m::test {

inline arch::emu::Options options_of_seed(uint64_t seed) {
  using namespace arch::emu;
  Options options;
  options.seed = seed;
  options.schedule = static_cast<Schedule>(seed % 3);
  options.landing = static_cast<Landing>(seed / 3 % 3);
  options.wgmma = static_cast<WgmmaExecution>(seed / 9 % 3);
  return options;
}

inline void report_case(bool ok, const char* file, int line, uint64_t seed,
                        const std::string& expected, const arch::emu::Report& got) {
  report(ok, file, line,
         "seed " + std::to_string(seed) + ": expected " + expected + ", got:\n" + got.text());
}

/// The kernel is clean on 20 seeds, which take every way to schedule, land copies and run wgmma.
template <typename Kernel>
void expect_clean(const char* file, int line, const arch::emu::LaunchShape& shape,
                  const Kernel& kernel) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const arch::emu::Report report = arch::emu::launch(shape, kernel, options_of_seed(seed));
    report_case(report.ok(), file, line, seed, "a clean run", report);
  }
}

/// The error is reported under one of these kinds ("a|b"), whatever the schedule.
template <typename Kernel>
void expect_caught(const char* file, int line, const std::string& kinds,
                   const arch::emu::LaunchShape& shape, const Kernel& kernel) {
  for (uint64_t seed = 1; seed <= 9; ++seed) {
    const arch::emu::Report report = arch::emu::launch(shape, kernel, options_of_seed(seed));
    bool found = false;
    std::stringstream alternatives(kinds);
    for (std::string kind; std::getline(alternatives, kind, '|');) found |= report.has(kind);
    report_case(found, file, line, seed, "an issue of kind " + kinds, report);
  }
}

}  // namespace qwen1m::test

#define EXPECT_CLEAN(...) qwen1m::test::expect_clean(__FILE__, __LINE__, __VA_ARGS__)
#define EXPECT_CAUGHT(...) qwen1m::test::expect_caught(__FILE__, __LINE__, __VA_ARGS__)
