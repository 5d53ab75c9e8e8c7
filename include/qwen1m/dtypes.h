#pragma once
/// Storage types that C++20 does not have. They hold bits; arithmetic is done in float.

#include <bit>
#include <cstdint>

namespace qwen1m {

/// bfloat16: the upper half of an IEEE float.
struct bf16 {
  uint16_t bits = 0;

  bf16() = default;
  /// Round to nearest even; a NaN stays a (quiet) NaN, an overflow becomes infinity.
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint32_t quiet_nan = (u >> 16) | 0x0040u;  // rounding could carry a NaN to infinity
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    // A selection, not a branch: loops over it are vectorised.
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
static_assert(sizeof(bf16) == 2);

/// Element type of an untyped view.
enum class DType : uint8_t { kFloat32, kBFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace qwen1m
