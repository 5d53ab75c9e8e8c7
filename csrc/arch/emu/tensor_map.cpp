#include "arch/emu/tensor_map.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "arch/emu/emulator.h"
#include "arch/emu/global_memory.h"
#include "qwen1m/error.h"

namespace qwen1m::arch::emu {
namespace {

constexpr uint64_t kMagic = 0x71314d3a746d6170;

void require(bool ok, const std::string& argument, const char* expected, uint64_t got) {
  if (ok) return;
  throw Error("make_tensor_map: " + argument + ": expected " + expected + ", got " +
              std::to_string(got));
}

}  // namespace

TensorMap make_tensor_map(const TensorMapSpec& spec) {
  const auto base = reinterpret_cast<uintptr_t>(spec.base);
  require(base != 0 && base % 16 == 0, "base", "a 16-byte aligned address", base);
  require(spec.element_bytes == 2 || spec.element_bytes == 4, "element_bytes", "2 or 4",
          static_cast<uint64_t>(spec.element_bytes));
  const auto element_bytes = static_cast<uint64_t>(spec.element_bytes);
  uint64_t extent = spec.sizes[0] * element_bytes;
  for (size_t i = 0; i < 5; ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    require(spec.sizes[i] >= 1 && spec.sizes[i] <= UINT64_C(1) << 32, "sizes" + index, "1 to 2^32",
            spec.sizes[i]);
    require(spec.box[i] >= 1 && spec.box[i] <= 256, "box" + index, "1 to 256", spec.box[i]);
    if (i == 0) continue;
    const uint64_t stride = spec.stride_bytes[i - 1];
    require(stride % 16 == 0 && stride < UINT64_C(1) << 40,
            "stride_bytes[" + std::to_string(i - 1) + "]", "a multiple of 16 below 2^40", stride);
    extent += (spec.sizes[i] - 1) * stride;
  }
  const uint64_t row_bytes = spec.box[0] * element_bytes;
  require(row_bytes % 16 == 0, "box[0]", "elements of a multiple of 16 bytes", spec.box[0]);
  const int swizzle = static_cast<int>(spec.swizzle);
  require(swizzle == 0 || swizzle == 32 || swizzle == 64 || swizzle == 128, "swizzle",
          "0, 32, 64 or 128", static_cast<uint64_t>(swizzle));
  require(swizzle == 0 || row_bytes <= static_cast<uint64_t>(swizzle), "box[0]",
          "at most the bytes of the swizzle", spec.box[0]);
  const GlobalAllocation* allocation = GlobalMemory::instance().find(spec.base);
  require(allocation != nullptr, "base", "an address in registered global memory", base);
  const uint64_t room = allocation->bytes - (base - reinterpret_cast<uintptr_t>(allocation->base));
  require(
      extent <= room, "sizes and stride_bytes",
      ("at most the " + std::to_string(room) + " bytes left in '" + allocation->name + "'").c_str(),
      extent);

  EncodedMap encoded{};
  encoded.magic = kMagic;
  encoded.base = static_cast<uint8_t*>(spec.base);
  std::copy_n(spec.sizes, 5, encoded.sizes);
  std::copy_n(spec.stride_bytes, 4, encoded.stride_bytes);
  std::copy_n(spec.box, 5, encoded.box);
  encoded.element_bytes = static_cast<uint8_t>(spec.element_bytes);
  encoded.swizzle = static_cast<uint8_t>(swizzle);
  TensorMap map{};
  std::memcpy(map.bytes, &encoded, sizeof(encoded));
  return map;
}

EncodedMap decode_tensor_map(const TensorMap& map, Site site) {
  EncodedMap encoded;
  std::memcpy(&encoded, map.bytes, sizeof(encoded));
  if (encoded.magic != kMagic) {
    report_fatal("tensor-map", site, "the tensor map was not made by make_tensor_map");
  }
  return encoded;
}

BoxRow box_row(const EncodedMap& map, const Coordinates5& at, uint32_t row) {
  uint8_t* global = map.base;
  for (int dim = 1; dim < 5; ++dim) {
    const int64_t index = int64_t{at.c[dim]} + row % map.box[dim];
    row /= map.box[dim];
    if (index < 0 || index >= static_cast<int64_t>(map.sizes[dim])) return {};
    global += index * static_cast<int64_t>(map.stride_bytes[dim - 1]);
  }
  const int64_t first = std::max<int64_t>(at.c[0], 0);
  const int64_t end =
      std::min<int64_t>(int64_t{at.c[0]} + map.box[0], static_cast<int64_t>(map.sizes[0]));
  if (first >= end) return {};
  return {global + first * map.element_bytes,
          static_cast<uint32_t>(first - at.c[0]) * map.element_bytes,
          static_cast<uint32_t>(end - first) * map.element_bytes};
}

}  // namespace qwen1m::arch::emu
