#pragma once
/// What the C++ tests need of a framework. A test is a Q1M_TEST; main() is here; the exit code is
/// the number of tests that failed.

#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "qwen1m/error.h"

namespace qwen1m::test {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int failures = 0;  // of the current test

inline void report(bool ok, const char* file, int line, const std::string& text) {
  if (ok) return;
  if (++failures <= 5) std::cerr << "  " << file << ":" << line << ": " << text << "\n";
}

/// Runs f, which must throw qwen1m::Error with exactly this text.
inline void expect_error(const char* file, int line, const std::string& text,
                         const std::function<void()>& f) {
  try {
    f();
    report(false, file, line, "expected the error '" + text + "', got none");
  } catch (const Error& error) {
    report(error.what() == text, file, line,
           "expected the error '" + text + "', got '" + error.what() + "'");
  }
}

}  // namespace qwen1m::test

#define Q1M_TEST(name)                                                      \
  static void name();                                                       \
  [[maybe_unused]] static const auto& name##_case =                         \
      qwen1m::test::cases().emplace_back(qwen1m::test::Case{#name, &name}); \
  static void name()
#define EXPECT(condition) qwen1m::test::report((condition), __FILE__, __LINE__, #condition)
#define EXPECT_EQ(a, b)               \
  qwen1m::test::report(               \
      (a) == (b), __FILE__, __LINE__, \
      std::string(#a " == " #b ", got ") + std::to_string(a) + " and " + std::to_string(b))
#define EXPECT_ERROR(text, ...) \
  qwen1m::test::expect_error(__FILE__, __LINE__, (text), [&] { __VA_ARGS__; })

int main() {
  int failed = 0;
  for (const auto& test : qwen1m::test::cases()) {
    qwen1m::test::failures = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      qwen1m::test::report(false, test.name, 0, std::string("threw ") + error.what());
    }
    std::printf("%s %s\n", qwen1m::test::failures == 0 ? "pass" : "FAIL", test.name);
    std::fflush(stdout);
    failed += qwen1m::test::failures != 0;
  }
  if (qwen1m::test::cases().empty()) failed = 1;  // an empty test program is a mistake
  return failed;
}
