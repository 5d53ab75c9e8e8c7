#pragma once
/// swiglu on sm_80 and later, bf16: a block is a piece of one row. Compiled and emulated, not yet
/// run on a GPU.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/swiglu/swiglu_check.h"

namespace qwen1m {

struct SwigluKernel {
  static constexpr int kThreads = 256;
  static constexpr int kVectors = 2;  // per thread
  static constexpr int kPiece = kThreads * kVectors;

  struct Params {
    SwigluParams args;
    int vectors;      // of a row of out
    uint32_t pieces;  // of a row
  };
  struct Smem {};

  static Params params_of(const SwigluParams& p) {
    const auto vectors = static_cast<int>(p.out.size(1) / kVectorElems);
    return {p, vectors, static_cast<uint32_t>((vectors + kPiece - 1) / kPiece)};
  }
  static int64_t blocks(const Params& p) { return p.args.out.size(0) * p.pieces; }
  static int threads(const Params&) { return kThreads; }

  /// g / (1 + e^-g): where e^-g overflows the reciprocal of infinity is 0.
  static Q1M_DEVICE float silu(float g) {
    return g * arch::reciprocal_approx(1.0f + arch::exp2_approx(g * -1.44269504f));
  }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    arch::launch_dependents();
    const auto block = static_cast<uint32_t>(arch::block_index());
    const int64_t token = block / p.pieces;
    const int first = static_cast<int>(block % p.pieces) * kPiece + arch::thread_index();
    const bf16* gate = p.args.gate_up.as<const bf16>().at(token);
    const bf16* up = gate + p.args.out.size(1);
    bf16* out = p.args.out.as<bf16>().at(token);
    arch::Vec16 gates[kVectors], ups[kVectors];
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (const int at = first + i * kThreads; at < p.vectors) {
        gates[i] = arch::global_load(vector_at(gate, at));
        ups[i] = arch::global_load(vector_at(up, at));
      }
    }
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (const int at = first + i * kThreads; at < p.vectors) {
        float g[kVectorElems], u[kVectorElems];
        unpack(gates[i], g);
        unpack(ups[i], u);
        Q1M_UNROLL
        for (int e = 0; e < kVectorElems; ++e) g[e] = silu(g[e]) * u[e];
        arch::global_store(vector_at(out, at), pack(g));
      }
    }
  }
};

/// What the kernel demands beyond the op's contract.
inline void check_swiglu_gpu(const SwigluParams& p) {
  check_swiglu(p);
  const ArgCheck args("swiglu");
  require_bf16_vectors(args, "out", p.out);
  require_bf16_vectors(args, "gate_up", p.gate_up);
  args.require(p.out.size(1) % kVectorElems == 0, "out", "intermediate a multiple of 8 on a GPU",
               p.out.size(1));
}

}  // namespace qwen1m
