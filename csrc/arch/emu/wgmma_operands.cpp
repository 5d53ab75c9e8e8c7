// Matrix descriptors, and the product itself.

#include <algorithm>
#include <bit>
#include <cstring>

#include "arch/emu/simulation.h"
#include "arch/emu/tensor_map.h"

namespace qwen1m::arch::emu {
namespace {

constexpr int kK = 16;  // summed elements of one wgmma of bf16

float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

struct Descriptor {
  uint32_t start;
  uint32_t leading;
  uint32_t stride;
  uint32_t width;  // bytes of a row of the swizzle atom; 16 without a swizzle
};

Descriptor decode(uint64_t bits, Site site) {
  const auto field = [bits](int shift) {
    return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4;
  };
  constexpr uint32_t kWidths[4] = {16, 128, 64, 32};
  const Descriptor descriptor{field(0), field(16), field(32), kWidths[bits >> 62]};
  if ((bits >> 49 & 7) != 0) {
    report_fatal("wgmma-descriptor", site, "a base offset other than 0 is not modelled");
  }
  if (descriptor.start < kSharedBase) {
    report_fatal("wgmma-descriptor", site,
                 "start address " + std::to_string(descriptor.start) + " is below shared memory");
  }
  // Base offset 0 says that the pattern of the swizzle repeats at multiples of 8 rows.
  if (descriptor.width > 16 && (descriptor.start & (descriptor.width * 8 - 1) & ~0x7fU) != 0) {
    report_issue("wgmma-descriptor", site,
                 "start address " + shared_text(descriptor.start - kSharedBase) +
                     " is not in row 0 of a swizzle atom");
  }
  return descriptor;
}

/// Calls f(offset, mn, k) for the 16-byte chunks of an operand of `size` rows (columns of B), in
/// which 8 elements run along k (K-major) or along mn.
template <typename Function>
void for_each_chunk(const Descriptor& d, int size, Major major, const Function& f) {
  const auto visit = [&](uint32_t offset, int mn, int k) {
    const uint32_t address = d.start + offset;
    f((d.width == 16 ? address : swizzled(address, static_cast<int>(d.width))) - kSharedBase, mn,
      k);
  };
  if (major == Major::kK) {
    for (int row = 0; row < size; ++row) {
      const auto r = static_cast<uint32_t>(row);
      const uint32_t start = r / 8 * d.stride + r % 8 * d.width;
      visit(start, row, 0);
      visit(start + (d.width == 16 ? d.leading : 16), row, 8);
    }
    return;
  }
  for (int k = 0; k < kK; ++k) {
    const auto row = static_cast<uint32_t>(k);
    for (int mn = 0; mn < size; mn += 8) {
      const auto column = static_cast<uint32_t>(mn);
      if (d.width == 16) {
        visit(column / 8 * d.stride + row / 8 * d.leading + row % 8 * 16, mn, k);
      } else {
        const uint32_t group = d.width / 2;  // columns in a row of the atom
        visit(column % group * 2 + column / group * d.leading + row % 8 * d.width +
                  row / 8 * d.stride,
              mn, k);
      }
    }
  }
}

/// Reads an operand as rows of `pitch` floats: along mn in rows of k, or the other way round.
void load_operand(SharedMemory& shared, uint64_t bits, int size, Major major, bool rows_of_k,
                  Site site, std::vector<float>& to) {
  to.resize(static_cast<size_t>(size) * kK);
  const Descriptor descriptor = decode(bits, site);
  for_each_chunk(descriptor, size, major, [&](uint32_t offset, int mn, int k) {
    uint16_t chunk[8];
    std::memcpy(chunk, shared.at(offset), 16);
    for (int i = 0; i < 8; ++i) {
      const int row = major == Major::kK ? mn : mn + i;
      const int step = major == Major::kK ? k + i : k;
      to[static_cast<size_t>(rows_of_k ? step * size + row : row * kK + step)] =
          bf16_value(chunk[i]);
    }
  });
}

void note_operand(Block& block, uint64_t bits, int size, Major major, Site site, const Actor& actor,
                  const char* what) {
  const Descriptor descriptor = decode(bits, site);
  for_each_chunk(descriptor, size, major, [&](uint32_t offset, int, int) {
    block.shared.check_range(offset, 16, 16, site, what);
    block.shared.note_read(offset, 16, actor, site, what);
  });
}

}  // namespace

void note_operands(Block& block, const WgmmaOperation& operation, const Actor& actor) {
  const WgmmaCall& call = operation.call;
  if (call.a_registers == nullptr) {
    note_operand(block, call.a, 64, call.major_a, operation.site, actor, "wgmma, operand A,");
  }
  note_operand(block, call.b, call.n, call.major_b, operation.site, actor, "wgmma, operand B,");
}

void execute(Block& block, WgmmaOperation& operation) {
  static thread_local std::vector<float> a_tile;
  static thread_local std::vector<float> b_tile;
  const WgmmaCall& call = operation.call;
  const auto n = static_cast<size_t>(call.n);
  if (call.a_registers == nullptr) {
    load_operand(block.shared, call.a, 64, call.major_a, false, operation.site, a_tile);
  }
  load_operand(block.shared, call.b, call.n, call.major_b, true, operation.site, b_tile);
  const float* a = call.a_registers == nullptr ? a_tile.data() : operation.a_tile.data();
  float* d = operation.tile->values.data();
  if (!call.accumulate) std::fill_n(d, 64 * n, 0.0F);
  for (size_t row = 0; row < 64; ++row) {
    for (size_t k = 0; k < kK; ++k) {
      const float factor = a[row * kK + k];
      const float* b = b_tile.data() + k * n;
      for (size_t column = 0; column < n; ++column) d[row * n + column] += factor * b[column];
    }
  }
  operation.executed = true;
}

}  // namespace qwen1m::arch::emu
