#pragma once
/// What the 128 bytes of a TensorMap hold under the emulator, and the walk over a box.

#include <cstdint>

#include "arch/arch.h"
#include "arch/emu/report.h"

namespace qwen1m::arch::emu {

struct EncodedMap {
  uint64_t magic;
  uint8_t* base;
  uint64_t sizes[5];
  uint64_t stride_bytes[4];
  uint16_t box[5];
  uint8_t element_bytes;
  uint8_t swizzle;

  uint32_t row_bytes() const { return uint32_t{box[0]} * element_bytes; }
  uint32_t rows() const { return uint32_t{box[1]} * box[2] * box[3] * box[4]; }
  uint32_t box_bytes() const { return row_bytes() * rows(); }
};
static_assert(sizeof(EncodedMap) <= sizeof(TensorMap));

/// Ends the launch if `map` was not made by make_tensor_map.
EncodedMap decode_tensor_map(const TensorMap& map, Site site);

/// The part of a box row that lies inside the tensor.
struct BoxRow {
  uint8_t* global = nullptr;   // of the first element inside; null: the row is outside
  uint32_t skipped_bytes = 0;  // of the row, before it
  uint32_t bytes = 0;
};
BoxRow box_row(const EncodedMap& map, const Coordinates5& at, uint32_t row);

/// Where 16-byte chunks go: bits of the shared address, not of the offset in the tile.
inline uint32_t swizzled(uint32_t address, int width) {
  const uint32_t mask = width == 128 ? 0x70 : width == 64 ? 0x30 : width == 32 ? 0x10 : 0;
  return address ^ ((address >> 3) & mask);
}

}  // namespace qwen1m::arch::emu
