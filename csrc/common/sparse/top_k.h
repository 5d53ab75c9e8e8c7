#pragma once
/// The k largest of many scores, without sorting them.

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

namespace qwen1m {

/// Scores as integers of the same order: -inf .. +inf, then NaN of positive sign.
constexpr uint32_t score_order(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes 0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

/// Calls take(i) in ascending order for the k indices i of [0, n) with the largest order(i), equal
/// ones going to the lower index. 0 <= k <= n. A radix select: three passes count 11, 11 and 10
/// bits of those that share the bits found so far, one pass takes.
template <typename Order, typename Take>
void top_k(int64_t n, int64_t k, Order&& order, Take&& take) {
  if (k <= 0) return;
  uint32_t found = 0;     // the leading bits of the k-th largest
  int64_t remaining = k;  // of those that share them
  int low = 32;
  for (const int bits : {11, 11, 10}) {
    const int high = low;
    low -= bits;
    std::array<int64_t, 2048> count{};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t x = order(i);
      if (high == 32 || x >> high == found) ++count[(x >> low) & ((1u << bits) - 1)];
    }
    uint32_t digit = (1u << bits) - 1;
    while (count[digit] < remaining) remaining -= count[digit--];
    found = found << bits | digit;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = order(i);
    if (x > found || (x == found && remaining-- > 0)) take(i);
  }
}

}  // namespace qwen1m
