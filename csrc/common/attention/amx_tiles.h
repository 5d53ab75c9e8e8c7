#pragma once
/// AMX tiles behind a seam of two implementations with the same members: the instructions, and a
/// model of them in plain C++, so that the kernel source (amx_kernel.h) is compiled and tested on
/// machines without AMX.
///
/// All eight tiles have 16 rows of 64 bytes. multiply<C, A, B>: A holds 16 rows of 32 bf16, B holds
/// 16 rows of 16 pairs of bf16, C holds 16 x 16 floats:
///   C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1]
/// Intel SDM, TDPBF16PS: even and odd products are summed apart from zero, each a fused
/// multiply-add in ascending k, then added to each other, then to C; round to nearest even,
/// denormals are zero and flushed to zero, MXCSR is not looked at.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/attention/simd.h"

namespace qwen1m {
namespace {  // NOLINT: see simd.h

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

#if defined(__AMX_BF16__)
/// Not run on AMX hardware by this project yet: compiled, and tested as SoftwareTiles.
struct HardwareTiles {
  /// torch's oneDNN uses tiles too and keeps a configuration (no data) between its calls: the old
  /// one goes to saved[64] and comes back with restore, all zero where there was none.
  static void configure(void* saved) {
    _tile_storeconfig(saved);
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  static void restore(const void* saved) { _tile_loadconfig(saved); }

  // The instructions name their tiles in the opcode: a literal each.
  template <int kTile>
  static void zero() {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    static_assert(kTile <= 2, "the accumulators");
  }
  template <int kTile>
  static void load(const void* p, int64_t row_stride_bytes) {
    const auto stride = static_cast<size_t>(row_stride_bytes);
    if constexpr (kTile == 0) _tile_loadd(0, p, stride);
    if constexpr (kTile == 1) _tile_loadd(1, p, stride);
    if constexpr (kTile == 2) _tile_loadd(2, p, stride);
    if constexpr (kTile == 3) _tile_loadd(3, p, stride);
    if constexpr (kTile == 4) _tile_loadd(4, p, stride);
    if constexpr (kTile == 5) _tile_loadd(5, p, stride);
    if constexpr (kTile == 6) _tile_loadd(6, p, stride);
    static_assert(kTile <= 6);
  }
  template <int kTile>
  static void store(void* p, int64_t row_stride_bytes) {
    const auto stride = static_cast<size_t>(row_stride_bytes);
    if constexpr (kTile == 0) _tile_stored(0, p, stride);
    if constexpr (kTile == 1) _tile_stored(1, p, stride);
    if constexpr (kTile == 2) _tile_stored(2, p, stride);
    static_assert(kTile <= 2, "the accumulators");
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    static_assert(kA == 3 && kB == kC + 4, "the pairs that amx_kernel.h uses");
    if constexpr (kC == 0) _tile_dpbf16ps(0, 3, 4);
    if constexpr (kC == 1) _tile_dpbf16ps(1, 3, 5);
    if constexpr (kC == 2) _tile_dpbf16ps(2, 3, 6);
  }
};
#endif

struct SoftwareTiles {
  static void configure(void* saved) {
    memcpy(saved, &config(), sizeof(TileConfig));
    config() = TileConfig{};
    memset(tiles(), 0, sizeof(Tile) * 8);
  }
  static void restore(const void* saved) {
    memcpy(&config(), saved, sizeof(TileConfig));
    memset(tiles(), 0xff, sizeof(Tile) * 8);  // NaN: no data survives
  }
  template <int kTile>
  static void zero() {
    memset(tiles()[kTile].words, 0, sizeof(Tile));
  }
  /// As many rows and bytes as the configuration says: under another user's the numbers are wrong.
  template <int kTile>
  static void load(const void* p, int64_t row_stride_bytes) {
    const TileConfig& c = config();
    for (int64_t row = 0; row < c.rows[kTile]; ++row) {
      memcpy(tiles()[kTile].words[row], static_cast<const char*>(p) + row * row_stride_bytes,
             c.row_bytes[kTile]);
    }
  }
  template <int kTile>
  static void store(void* p, int64_t row_stride_bytes) {
    const TileConfig& c = config();
    for (int64_t row = 0; row < c.rows[kTile]; ++row) {
      memcpy(static_cast<char*>(p) + row * row_stride_bytes, tiles()[kTile].words[row],
             c.row_bytes[kTile]);
    }
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < 16; ++k) {
          const uint32_t a = tiles()[kA].words[m][k], b = tiles()[kB].words[k][n];
          // A product of two bf16 is exact in fp32 (above the denormals), so this is fused.
          even = flush(bf16_value(a << 16) * bf16_value(b << 16) + even);
          odd = flush(bf16_value(a & 0xffff0000u) * bf16_value(b & 0xffff0000u) + odd);
        }
        uint32_t& c = tiles()[kC].words[m][n];
        c = std::bit_cast<uint32_t>(flush(flush(std::bit_cast<float>(c)) + flush(even + odd)));
      }
    }
  }

 private:
  struct Tile {
    uint32_t words[16][16];
  };
  static Tile* tiles() {
    static thread_local Tile all[8];
    return all;
  }
  static TileConfig& config() {
    static thread_local TileConfig current{.palette = 0, .row_bytes = {}, .rows = {}};
    return current;
  }
  static float flush(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static float bf16_value(uint32_t bits) { return flush(std::bit_cast<float>(bits)); }
};

}  // namespace
}  // namespace qwen1m
