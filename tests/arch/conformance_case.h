#pragma once
/// What a conformance test of a primitive consists of. The kernels are written against arch.h alone
/// and run unchanged under the emulator and on a GPU; what they must give is computed on the host
/// in plain loops from the definitions in the PTX manual, not by code of either.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "arch/arch.h"

namespace qwen1m::conformance {

/// Parameters of every probe kernel.
struct Params {
  arch::TensorMap map;  // of the case's `map`, if it has one
  const uint32_t* in;
  uint32_t* out;
  int32_t argument[8];
};

struct Case {
  std::string name;
  std::vector<uint32_t> in;
  std::vector<uint32_t> expected;  // all of `out`, which starts as 0xffffffff everywhere
  std::vector<int32_t> argument;
  bool has_map = false;
  bool map_is_of_out = false;       // else of `in`
  arch::TensorMapSpec map;          // without base
  std::vector<uint32_t> out_start;  // if `out` starts as something else
  float relative_error = -1;        // >= 0: the words are fp32, and may be off by so much
};

inline constexpr uint32_t kUntouched = 0xffffffff;

/// Bytes in a buffer of words.
inline void put_bytes(std::vector<uint32_t>& words, size_t at, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<unsigned char*>(words.data()) + at, from, bytes);
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
/// bf16 of a float that it holds exactly.
inline uint16_t exact_bf16(float x) { return static_cast<uint16_t>(float_bits(x) >> 16); }

/// First word in which `out` is not as expected, or -1.
inline int64_t first_difference(const Case& test, const std::vector<uint32_t>& out) {
  for (size_t i = 0; i < test.expected.size(); ++i) {
    if (out[i] == test.expected[i]) continue;
    float got;
    float expected;
    std::memcpy(&got, &out[i], 4);
    std::memcpy(&expected, &test.expected[i], 4);
    const float difference = got > expected ? got - expected : expected - got;
    const float size = expected < 0 ? -expected : expected;
    if (test.relative_error >= 0 && difference <= test.relative_error * size) continue;
    return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace qwen1m::conformance
