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

/// float8_e4m3fn (arXiv:2209.05433): exponents of 4 bits with bias 7, no infinities, up to 448.
struct e4m3 {
  uint8_t bits = 0;

  e4m3() = default;
  /// Round to nearest even; what is beyond 448 becomes 448, a NaN stays a NaN.
  constexpr explicit e4m3(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), magnitude = u & 0x7fffffffu;
    const uint32_t a = magnitude > kLargest ? kLargest : magnitude;
    // The three upper bits of the mantissa; the exponent's bias goes from 127 to 7.
    const uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
    // Below 2^-6 in steps of 2^-9, which is what a float of 2^14 can hold.
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 16384.0f) -
                           std::bit_cast<uint32_t>(16384.0f);
    const uint32_t rounded = a < kSmallestNormal ? small : normal;
    bits = static_cast<uint8_t>((magnitude > 0x7f800000u ? 0x7fu : rounded) | (u >> 24 & 0x80u));
  }
  /// Exact, in bf16 too.
  explicit operator float() const {
    const uint32_t magnitude = bits & 0x7fu;
    const float normal = std::bit_cast<float>((magnitude << 20) + (120u << 23));
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    const float value = magnitude < 8 ? small : normal;
    const uint32_t u = magnitude == 0x7f ? 0x7fc00000u : std::bit_cast<uint32_t>(value);
    return std::bit_cast<float>(u | (uint32_t{bits} & 0x80u) << 24);
  }

 private:
  static constexpr uint32_t kLargest = std::bit_cast<uint32_t>(448.0f);
  static constexpr uint32_t kSmallestNormal = std::bit_cast<uint32_t>(0x1p-6f);
};
static_assert(sizeof(e4m3) == 1);

/// Element type of an untyped view.
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat8E4M3 };

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}

}  // namespace qwen1m
