#pragma once
/// qkv_rope_append on sm_80 and later, bf16, into a cache in bf16 or e4m3. A thread owns a few
/// columns, a vector of q or v or the two vectors of a key that rotate into each other, for kTokens
/// tokens: it reads its bias and its head's scale once. A block is a piece of the columns. Every
/// operation is rounded as on the CPU, and so are the codes of an fp8 cache. Compiled and emulated,
/// not yet run on a GPU.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/qkv_rope_append/qkv_rope_append_check.h"

namespace qwen1m {

struct QkvRopeAppendLaunch {
  QkvRopeAppendParams args;
  int q_vectors;     // of a token
  int kv_vectors;    // of a token's keys; as many values
  int half_vectors;  // of half a head
  uint32_t pieces;   // blocks for the columns of a token
};

/// Cache: bf16 or e4m3.
template <typename Cache>
struct QkvRopeAppendKernel {
  static constexpr int kThreads = 128;
  static constexpr int kTokens = 4;
  static constexpr bool kFp8 = sizeof(Cache) == 1;

  using Params = QkvRopeAppendLaunch;
  struct Smem {};

  static Params params_of(const QkvRopeAppendParams& p) {
    const int64_t head_dim = p.q.size(2);
    const auto q_vectors = static_cast<int>(p.q.size(1) * head_dim / kVectorElems);
    const auto kv_vectors = static_cast<int>(p.k_cache.size(1) * head_dim / kVectorElems);
    const int units = q_vectors + kv_vectors + kv_vectors / 2;
    return {p, q_vectors, kv_vectors, static_cast<int>(head_dim / (2 * kVectorElems)),
            static_cast<uint32_t>((units + kThreads - 1) / kThreads)};
  }
  static int64_t blocks(const Params& p) {
    return (p.args.q.size(0) + kTokens - 1) / kTokens * p.pieces;
  }
  static int threads(const Params&) { return kThreads; }

  /// Columns [column, column + 8) of a token with their bias.
  static Q1M_DEVICE void add_bias(float (&values)[kVectorElems], const Params& p,
                                  const arch::Vec16& bias) {
    if (!p.args.bias) return;
    float b[kVectorElems];
    unpack(bias, b);
    Q1M_UNROLL
    for (int e = 0; e < kVectorElems; ++e) values[e] += b[e];
  }
  static Q1M_DEVICE arch::Vec16 load_bias(const Params& p, int vector) {
    if (!p.args.bias) return {};
    return arch::global_load(vector_at(p.args.bias.as<const bf16>().data, vector));
  }

  /// Where the token's row of KV head 0 begins in a cache; -1 if nothing is appended. (A slot that
  /// is not in the cache is the caller's error; it is not written outside of it.)
  static Q1M_DEVICE int64_t cache_row(const Params& p, int64_t token) {
    const int64_t slot = arch::global_load(p.args.slot_mapping.at(token));
    const AnyView<4>& cache = p.args.k_cache;
    if (slot < 0 || slot >= cache.size(0) * kPageSize) return -1;
    return (slot / kPageSize * cache.size(1) * kPageSize + slot % kPageSize) * cache.size(3);
  }

  /// Scale of a KV head; without fp8 nobody asks for it.
  static Q1M_DEVICE float load_scale(const TensorView<const float, 1>& scale, int kv_head) {
    return kFp8 ? arch::global_load(scale.at(kv_head)) : 1.0f;
  }

  /// 8 values of a head into the cache: rounded once, in fp8 after the division by the scale.
  static Q1M_DEVICE void append(Cache* head, int in_head, const float (&values)[kVectorElems],
                                float scale) {
    if constexpr (kFp8) {
      uint32_t pairs[kVectorElems / 2];
      Q1M_UNROLL
      for (int i = 0; i < kVectorElems / 2; ++i) {
        pairs[i] = arch::pack_e4m3(values[2 * i] / scale, values[2 * i + 1] / scale);
      }
      const uint32_t low = pairs[0] | pairs[1] << 16, high = pairs[2] | pairs[3] << 16;
      arch::global_store(reinterpret_cast<uint64_t*>(head) + in_head, uint64_t{high} << 32 | low);
    } else {
      arch::global_store(vector_at(head, in_head), pack(values));
    }
  }

  /// q or v: out = x + bias.
  static Q1M_DEVICE void copy(const Params& p, int64_t first, int unit) {
    const bool is_q = unit < p.q_vectors;
    const int vector = is_q ? unit : unit + p.kv_vectors;  // keys lie between
    const int in_head = unit % (2 * p.half_vectors);
    const int head = (is_q ? unit : unit - p.q_vectors) / (2 * p.half_vectors);
    const arch::Vec16 bias = load_bias(p, vector);
    const float scale = is_q ? 1.0f : load_scale(p.args.v_scale, head);
    arch::Vec16 x[kTokens];
    Q1M_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if (first + t < p.args.q.size(0)) {
        x[t] = arch::global_load(vector_at(p.args.qkv.as<const bf16>().at(first + t), vector));
      }
    }
    Q1M_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= p.args.q.size(0)) break;
      float values[kVectorElems];
      unpack(x[t], values);
      add_bias(values, p, bias);
      if (is_q) {
        bf16* to = p.args.q.as<bf16>().at(first + t, head);
        arch::global_store(vector_at(to, in_head), pack(values));
      } else if (const int64_t row = cache_row(p, first + t); row >= 0) {
        append(p.args.v_cache.as<Cache>().at(int64_t{0}, head) + row, in_head, values, scale);
      }
    }
  }

  /// (cos, sin) of 8 rotary pairs of a token's key; NaN where the table has no such row.
  static Q1M_DEVICE void load_rotation(const Params& p, int64_t token, int vector,
                                       arch::Vec16 (&cos_sin)[4]) {
    int64_t position = arch::global_load(p.args.positions.at(token));
    if (position >= p.args.chunk_len) position %= p.args.chunk_len;
    const bool exists = position >= 0 && position < p.args.rope_table.size(0);
    const float* row = p.args.rope_table.at(exists ? position : 0, vector * kVectorElems);
    Q1M_UNROLL
    for (int w = 0; w < 4; ++w) {
      cos_sin[w] = exists ? arch::global_load(vector_at(row, w))
                          : arch::Vec16{{0x7fc00000, 0x7fc00000, 0x7fc00000, 0x7fc00000}};
    }
  }

  /// k: 8 pairs (d, d + D/2) of a head.
  static Q1M_DEVICE void rotate(const Params& p, int64_t first, int unit) {
    const int head = unit / p.half_vectors, in_half = unit % p.half_vectors;
    const int low = p.q_vectors + head * 2 * p.half_vectors + in_half;
    const int high = low + p.half_vectors;
    const arch::Vec16 bias_low = load_bias(p, low), bias_high = load_bias(p, high);
    const float scale = load_scale(p.args.k_scale, head);
    Q1M_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const int64_t token = first + t;
      if (token >= p.args.q.size(0)) break;
      const int64_t row = cache_row(p, token);
      if (row < 0) continue;
      const bf16* qkv = p.args.qkv.as<const bf16>().at(token);
      const arch::Vec16 x_low = arch::global_load(vector_at(qkv, low));
      const arch::Vec16 x_high = arch::global_load(vector_at(qkv, high));
      arch::Vec16 cos_sin[4];
      load_rotation(p, token, in_half, cos_sin);
      float a[kVectorElems], b[kVectorElems];
      unpack(x_low, a);
      unpack(x_high, b);
      add_bias(a, p, bias_low);
      add_bias(b, p, bias_high);
      Q1M_UNROLL
      for (int e = 0; e < kVectorElems; ++e) {
        const float c = arch::as_float(cos_sin[e / 2].word[e % 2 * 2]);
        const float s = arch::as_float(cos_sin[e / 2].word[e % 2 * 2 + 1]);
        const float rotated = arch::multiply(a[e], c) - arch::multiply(b[e], s);
        b[e] = arch::multiply(b[e], c) + arch::multiply(a[e], s);
        a[e] = rotated;
      }
      Cache* to = p.args.k_cache.as<Cache>().at(int64_t{0}, head) + row;
      append(to, in_half, a, scale);
      append(to, in_half + p.half_vectors, b, scale);
    }
  }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    arch::launch_dependents();
    const auto block = static_cast<uint32_t>(arch::block_index());
    const int64_t first = int64_t{block / p.pieces} * kTokens;
    const int unit = static_cast<int>(block % p.pieces) * kThreads + arch::thread_index();
    const int copies = p.q_vectors + p.kv_vectors;
    if (unit < copies) {
      copy(p, first, unit);
    } else if (unit < copies + p.kv_vectors / 2) {
      rotate(p, first, unit - copies);
    }
  }
};

/// What the kernel demands beyond the op's contract; slots, positions and scales are not read.
inline void check_qkv_rope_append_gpu(const QkvRopeAppendParams& p) {
  check_qkv_rope_append_layout(p);
  const ArgCheck args("qkv_rope_append");
  require_bf16_vectors(args, "q", p.q);
  require_aligned_rows(args, "k_cache", p.k_cache);  // bf16 as q, or fp8
  require_aligned_rows(args, "v_cache", p.v_cache);
  require_bf16_vectors(args, "qkv", p.qkv);
  if (p.bias) require_bf16_vectors(args, "bias", p.bias);
  const auto table = reinterpret_cast<uintptr_t>(p.rope_table.data);
  args.require(table % 16 == 0, "rope_table", "data aligned to 16 bytes on a GPU", table % 16);
  args.require(p.q.size(2) % (2 * kVectorElems) == 0, "q", "head_dim D a multiple of 16 on a GPU",
               p.q.size(2));
}

}  // namespace qwen1m
