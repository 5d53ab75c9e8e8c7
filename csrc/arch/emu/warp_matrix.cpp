// ldmatrix, stmatrix, mma.sync; and the approximate functions.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "arch/arch.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

const Thread& lane_of(const Warp& warp, int lane) {
  return *warp.block->threads[static_cast<size_t>(warp.index * 32 + lane)];
}

float flush_denormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}

}  // namespace

void ldmatrix_x4(uint32_t* r, uint32_t row, bool transposed, Site site) {
  struct Argument {
    uint32_t row;
    uint32_t* r;
  };
  Argument argument{row, r};
  const char* what = transposed ? "ldmatrix_x4_transposed" : "ldmatrix_x4";
  collective(what, &argument, site, [&] {
    const Warp& warp = *simulation().running->warp;
    SharedMemory& shared = warp.block->shared;
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t offset =
          own_offset(static_cast<Argument*>(warp.arguments[lane])->row, site, what);
      shared.check_range(offset, 16, 16, site, what);
      shared.note_read(offset, 16, lane_of(warp, lane).actor(), site, what);
      std::memcpy(matrices[lane / 8][lane % 8], shared.at(offset), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int x = lane / 4;
      const int y = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        const auto& m = matrices[i];
        const uint32_t low = transposed ? m[y][x] : m[x][y];
        const uint32_t high = transposed ? m[y + 1][x] : m[x][y + 1];
        static_cast<Argument*>(warp.arguments[lane])->r[i] = low | high << 16;
      }
    }
  });
}

void stmatrix_x4(uint32_t row, const uint32_t* r, Site site) {
  struct Argument {
    uint32_t row;
    const uint32_t* r;
  };
  Argument argument{row, r};
  collective("stmatrix_x4", &argument, site, [&] {
    const Warp& warp = *simulation().running->warp;
    SharedMemory& shared = warp.block->shared;
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t offset =
          own_offset(static_cast<Argument*>(warp.arguments[lane])->row, site, "stmatrix_x4");
      shared.check_range(offset, 16, 16, site, "stmatrix_x4");
      shared.note_write(offset, 16, lane_of(warp, lane).actor(), site, "stmatrix_x4");
      for (int i = 0; i < 4; ++i) {
        // Elements 2 i and 2 i + 1 of row l % 8 of matrix l / 8 are in lane 4 (l % 8) + i.
        const auto* from = static_cast<Argument*>(warp.arguments[4 * (lane % 8) + i]);
        std::memcpy(shared.at(offset) + 4 * i, &from->r[lane / 8], 4);
      }
    }
  });
}

float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0F : 1.0F;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}
uint16_t float_to_f16(float value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7fff;
  if (magnitude >= 65520.0F) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = f 2^exponent, f in [1/2, 1)
  const int shift = std::max(exponent - 11, -24);
  // nearbyint rounds ties to even; a carry runs into the exponent as it should.
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -shift)));
  const int base = shift == -24 ? 0 : (shift + 24) << 10;
  return static_cast<uint16_t>(sign | (base + steps));
}

namespace {

struct MmaArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

/// The product of all lanes' fragments, whose 16-bit halves are numbers as `low` and `high` say.
template <float (*low)(uint32_t), float (*high)(uint32_t)>
void multiply_fragments() {
  using Argument = MmaArgument;
  const Warp& warp = *simulation().running->warp;
  float a_tile[16][16];
  float b_tile[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Argument*>(warp.arguments[lane]);
    const int group = lane / 4;
    const int pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      a_tile[group + 8 * (i & 1)][pair + 8 * (i >> 1)] = low(mine.a[i]);
      a_tile[group + 8 * (i & 1)][pair + 8 * (i >> 1) + 1] = high(mine.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b_tile[pair + 8 * i][group] = low(mine.b[i]);
      b_tile[pair + 8 * i + 1][group] = high(mine.b[i]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Argument*>(warp.arguments[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1);
      const int column = 2 * (lane % 4) + (i & 1);
      float sum = mine.d[i];
      for (int k = 0; k < 16; ++k) sum += a_tile[row][k] * b_tile[k][column];
      mine.d[i] = sum;
    }
  }
}

float f16_low(uint32_t pair) { return f16_to_float(static_cast<uint16_t>(pair)); }
float f16_high(uint32_t pair) { return f16_to_float(static_cast<uint16_t>(pair >> 16)); }

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{d, a, b};
  collective("mma_m16n8k16", &argument, site, multiply_fragments<bf16_low, bf16_high>);
}
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{d, a, b};
  collective("mma_m16n8k16_f16", &argument, site, multiply_fragments<f16_low, f16_high>);
}

float exp2_approx(float x) { return flush_denormal(std::exp2(flush_denormal(x))); }
float log2_approx(float x) { return flush_denormal(std::log2(flush_denormal(x))); }
float reciprocal_approx(float x) { return flush_denormal(1.0F / flush_denormal(x)); }

}  // namespace qwen1m::arch::emu
