#pragma once
/// rms_norm on sm_80 and later, bf16. A block is one row, which stays in registers between the sum
/// of squares and the product: every value is read once and written once. The shape of a block
/// follows from `hidden` alone, so that a row's bits do not depend on the other rows. Compiled and
/// emulated, not yet run on a GPU.

#include <algorithm>
#include <cmath>

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/rms_norm/rms_norm_check.h"

namespace qwen1m {

struct RmsNormKernel {
  static constexpr int kThreads = 1024;  // at most
  static constexpr int kVectors = 4;     // of a row, per thread
  static constexpr int64_t kMaxHidden = int64_t{kVectorElems} * kThreads * kVectors;

  struct Params {
    RmsNormParams args;
    int vectors;  // of a row
    int threads;  // of a block
  };
  struct Smem {
    float partial[32];  // of each warp
  };

  /// Two vectors per thread: enough bytes on their way, with several blocks on a multiprocessor.
  static Params params_of(const RmsNormParams& p) {
    const int vectors = static_cast<int>(p.x.size(1) / kVectorElems);
    return {p, vectors, std::clamp((vectors / 2 + 31) / 32 * 32, 32, kThreads)};
  }
  static int64_t blocks(const Params& p) { return p.args.x.size(0); }
  static int threads(const Params& p) { return p.threads; }

  static Q1M_DEVICE float warp_sum(float value) {
    Q1M_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += arch::shuffle_xor(value, mask);
    return value;
  }

  /// The same sum in every thread.
  static Q1M_DEVICE float block_sum(const Params& p, float value) {
    const auto partial = Q1M_SHARED_MEMBER(arch::shared_memory<Smem>(), partial);
    value = warp_sum(value);
    const int lane = arch::lane_index();
    if (lane == 0) arch::shared_store(partial[arch::warp_index()], value);
    arch::block_sync();
    return warp_sum(lane < p.threads / 32 ? arch::shared_load(partial[lane]) : 0.0f);
  }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();  // in front of every access: each input may come from that grid
    arch::launch_dependents();
    const int64_t token = arch::block_index();
    const int first = arch::thread_index(), step = p.threads;
    const bf16* x = p.args.x.as<const bf16>().at(token);
    arch::Vec16 row[kVectors], other[kVectors];
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {  // out may be x, hence not through the read-only path
      row[i] = {};
      if (const int at = first + i * step; at < p.vectors) {
        row[i] = arch::global_load_coherent(vector_at(x, at));
      }
    }
    if (p.args.residual) {
      bf16* residual = p.args.residual.as<bf16>().at(token);
      Q1M_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        if (const int at = first + i * step; at < p.vectors) {
          other[i] = arch::global_load_coherent(vector_at(const_cast<const bf16*>(residual), at));
        }
      }
      Q1M_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        if (const int at = first + i * step; at < p.vectors) {
          float a[kVectorElems], b[kVectorElems];
          unpack(row[i], a);
          unpack(other[i], b);
          Q1M_UNROLL
          for (int e = 0; e < kVectorElems; ++e) a[e] += b[e];
          row[i] = pack(a);
          arch::global_store(vector_at(residual, at), row[i]);
        }
      }
    }
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {  // on their way while the block sums
      if (const int at = first + i * step; at < p.vectors) {
        other[i] = arch::global_load(vector_at(p.args.weight.as<const bf16>().data, at));
      }
    }
    float sum = 0;
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float a[kVectorElems];
      unpack(row[i], a);
      Q1M_UNROLL
      for (int e = 0; e < kVectorElems; ++e) sum += a[e] * a[e];
    }
    const auto hidden = static_cast<float>(p.args.x.size(1));
    const float scale = 1.0f / sqrtf(block_sum(p, sum) / hidden + p.args.eps);
    bf16* out = p.args.out.as<bf16>().at(token);
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (const int at = first + i * step; at < p.vectors) {
        float a[kVectorElems], w[kVectorElems];
        unpack(row[i], a);
        unpack(other[i], w);
        Q1M_UNROLL
        for (int e = 0; e < kVectorElems; ++e) a[e] = a[e] * scale * w[e];
        arch::global_store(vector_at(out, at), pack(a));
      }
    }
  }
};

/// What the kernel demands beyond the op's contract.
inline void check_rms_norm_gpu(const RmsNormParams& p) {
  check_rms_norm(p);
  const ArgCheck args("rms_norm");
  require_bf16_vectors(args, "x", p.x);
  require_bf16_vectors(args, "out", p.out);
  require_bf16_vectors(args, "weight", p.weight);
  if (p.residual) require_bf16_vectors(args, "residual", p.residual);
  const int64_t hidden = p.x.size(1);
  args.require(
      hidden > 0 && hidden % kVectorElems == 0 && hidden <= RmsNormKernel::kMaxHidden, "x",
      "hidden a multiple of 8, at most " + std::to_string(RmsNormKernel::kMaxHidden) + ", on a GPU",
      hidden);
}

}  // namespace qwen1m
