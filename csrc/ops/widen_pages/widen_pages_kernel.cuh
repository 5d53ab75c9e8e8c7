#pragma once
/// widen_pages on sm_80 and later, to bf16: a block is a piece of a page of one head, a thread 8
/// codes at a time, so that its loads and its stores are both whole rows of a warp. Compiled and
/// emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/widen_pages/widen_pages_check.h"

namespace qwen1m {

struct WidenPagesKernel {
  static constexpr int kThreads = 128;
  static constexpr int kVectors = 8;  // of 8 codes, per thread
  static constexpr int kPiece = kThreads * kVectors;

  struct Params {
    WidenPagesParams args;
    int vectors;      // of a page of one head
    uint32_t pieces;  // of it
  };
  struct Smem {};

  static Params params_of(const WidenPagesParams& p) {
    const auto vectors = static_cast<int>(kPageSize * p.codes.size(3) / kVectorElems);
    return {p, vectors, static_cast<uint32_t>((vectors + kPiece - 1) / kPiece)};
  }
  static int64_t blocks(const Params& p) {
    return p.args.pages.size(0) * p.args.codes.size(1) * p.pieces;
  }
  static int threads(const Params&) { return kThreads; }

  /// The e4m3 in the lowest byte, exactly.
  static Q1M_DEVICE float value_of(uint32_t code) {
    const uint32_t magnitude = code & 0x7f;
    // An fp32 whose exponent is 120 too small; what is denormal comes out right as well.
    const float small = arch::as_float((code & 0x80) << 24 | magnitude << 20);
    return magnitude == 0x7f ? arch::as_float(0x7fc00000) : small * 0x1p120f;
  }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    arch::launch_dependents();
    const WidenPagesParams& args = p.args;
    const auto block = static_cast<uint32_t>(arch::block_index());
    const auto heads = static_cast<uint32_t>(args.codes.size(1));
    const uint32_t row = block / p.pieces, head = row % heads;
    const int64_t page = arch::global_load(args.pages.at(row / heads));
    if (page < 0 || page >= args.codes.size(0)) return;
    const float scale = arch::global_load(args.scale.at(head));
    const auto* from =
        reinterpret_cast<const uint64_t*>(args.codes.as<const e4m3>().at(page, head));
    bf16* to = args.wide.as<bf16>().at(page, head);
    const int first = static_cast<int>(block % p.pieces) * kPiece + arch::thread_index();
    uint64_t codes[kVectors];
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int at = first + i * kThreads;
      codes[i] = at < p.vectors ? arch::global_load(from + at) : uint64_t{0};
    }
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int at = first + i * kThreads;
      float values[kVectorElems];
      Q1M_UNROLL
      for (int e = 0; e < kVectorElems; ++e) {
        values[e] = value_of(static_cast<uint32_t>(codes[i] >> 8 * e) & 0xff) * scale;
      }
      if (at < p.vectors) arch::global_store(vector_at(to, at), pack(values));
    }
  }
};

/// What the kernel demands beyond the op's contract; pages and scales are not read.
inline void check_widen_pages_gpu(const WidenPagesParams& p) {
  check_widen_pages_layout(p);
  const ArgCheck args("widen_pages");
  require_bf16_vectors(args, "wide", p.wide);
  const auto codes = reinterpret_cast<uintptr_t>(p.codes.data);
  args.require(codes % 16 == 0, "codes", "data aligned to 16 bytes on a GPU", codes % 16);
  args.require(p.wide.size(3) % kVectorElems == 0, "wide", "D a multiple of 8 on a GPU",
               p.wide.size(3));
}

}  // namespace qwen1m
