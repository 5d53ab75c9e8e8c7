#pragma once
/// What the drivers of emulated attention kernels share (prefill_driver.cpp, decode_driver.cpp):
/// inputs, pages, and the definition in float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "arch/emu/emulator.h"
#include "inputs.h"
#include "qwen1m/dual_chunk.h"

namespace qwen1m::test {

/// chunk_len 208: borders lie inside pages.
inline constexpr DualChunk kChunks{.chunk_size = 250, .local_size = 42};
inline const float kNan = std::numeric_limits<float>::quiet_NaN();

/// Memory that the kernel may touch.
template <typename T>
struct Buffer {
  std::vector<T> values;
  Buffer(std::vector<T> v, const char* name, bool writable = false) : values(std::move(v)) {
    arch::emu::register_global(values.data(), values.size() * sizeof(T), name, writable);
  }
  ~Buffer() { arch::emu::unregister_global(values.data()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

/// A sequence with one KV head: its last `rows` tokens are queries of `heads` heads.
struct Sequence {
  int64_t kv_len, rows, heads, dim;
  float logit_scale;          // of row 0, and of all without row_step
  float row_step = 0;         // what each row's scale is larger by than that of the row before
  std::vector<bf16> q, k, v;  // [row, head, dim], [key, dim]
  std::vector<float> table;   // [position, dim / 2, 2]

  /// Logits are three times as large as those of unit variance.
  Sequence(int64_t tokens, int64_t num_rows, int64_t num_heads, int64_t head_dim, uint64_t seed)
      : kv_len(tokens),
        rows(num_rows),
        heads(num_heads),
        dim(head_dim),
        logit_scale(3.0f / std::sqrt(static_cast<float>(head_dim))),
        q(random_values<bf16>(rows * heads * dim, seed, 1.7f)),
        k(random_values<bf16>(kv_len * dim, seed + 1, 1.7f)),
        v(random_values<bf16>(kv_len * dim, seed + 2, 1.7f)) {
    for (int64_t position = 0; position <= kChunks.chunk_size; ++position) {
      for (int64_t i = 0; i < dim / 2; ++i) {
        const double phase =
            static_cast<double>(position) *
            std::pow(1e4, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
        table.push_back(static_cast<float>(std::cos(phase)));
        table.push_back(static_cast<float>(std::sin(phase)));
      }
    }
  }

  float scale(int64_t row) const { return logit_scale + static_cast<float>(row) * row_step; }

  /// The definition, float64. Keys are taken as they lie in the cache.
  void reference(int64_t row, int64_t head, std::vector<double>& out, double& lse) const {
    reference(row, head, out, lse, [](int64_t /*key*/) { return true; });
  }
  /// The same over the keys for which attends(key); without any, out is 0 and lse -inf.
  template <typename Attends>
  void reference(int64_t row, int64_t head, std::vector<double>& out, double& lse,
                 const Attends& attends) const {
    const int64_t token = kv_len - rows + row, half = dim / 2;
    std::vector<double> logits;
    for (int64_t j = 0; j <= token; ++j) {
      const int64_t distance = kChunks.chunk(token) - kChunks.chunk(j);
      const int64_t position = distance == 0   ? kChunks.intra_position(token)
                               : distance == 1 ? kChunks.successive_position(token)
                                               : kChunks.inter_position();
      const float* cs = table.data() + position * dim;
      const bf16* query = q.data() + (row * heads + head) * dim;
      const bf16* key = k.data() + j * dim;
      double sum = 0;
      for (int64_t i = 0; i < half; ++i) {
        const double c = cs[2 * i], s = cs[2 * i + 1];
        const double x = float(query[i]), y = float(query[i + half]);
        sum += (x * c - y * s) * float(key[i]) + (y * c + x * s) * float(key[i + half]);
      }
      logits.push_back(attends(j) ? sum * scale(row) : -std::numeric_limits<double>::infinity());
    }
    const double m = *std::max_element(logits.begin(), logits.end());
    double l = 0;
    std::fill(out.begin(), out.end(), 0.0);
    lse = m;
    if (std::isinf(m)) return;
    for (int64_t j = 0; j <= token; ++j) {
      const double p = std::exp(logits[static_cast<size_t>(j)] - m);
      l += p;
      for (int64_t d = 0; d < dim; ++d) {
        out[static_cast<size_t>(d)] += p * float(v[static_cast<size_t>(j * dim + d)]);
      }
    }
    for (double& x : out) x /= l;
    lse = m + std::log(l);
  }

  /// Puts keys or values into the pages of `table`; what is not theirs stays.
  void put(const std::vector<bf16>& from, const std::vector<int32_t>& pages,
           std::vector<bf16>& cache) const {
    for (int64_t j = 0; j < kv_len; ++j) {
      const int64_t page = pages[static_cast<size_t>(j / kPageSize)];
      std::copy_n(from.data() + j * dim, dim,
                  cache.data() + (page * kPageSize + j % kPageSize) * dim);
    }
  }
};

/// The larger one; a NaN stays.
inline void meet(double& largest, double error) {
  if (!std::isnan(largest) && !(error <= largest)) largest = error;
}

}  // namespace qwen1m::test
