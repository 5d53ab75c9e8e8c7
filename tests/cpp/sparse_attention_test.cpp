// sparse_prefill and sparse_estimate on every compiled instruction set: against each other and bit
// by bit against themselves. Numbers against the definition: tests/ops/test_sparse_*.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "inputs.h"
#include "kernels.h"
#include "ops/sparse_estimate/sparse_estimate_cpu.h"
#include "ops/sparse_prefill/sparse_prefill_cpu.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::kernels_for_prefill;
using test::random_values;
using test::threads;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kHeads = 4, kKvHeads = 2, kBegin = 192, kEnd = 286, kTokens = kEnd - kBegin;
constexpr DualChunk kChunks{.chunk_size = 112, .local_size = 16};  // the segment is chunk 2

/// A segment of three stages over pages in reverse order; what no token owns is NaN.
template <typename T>
struct Segment {
  int64_t dim;
  std::vector<T> q, k_cache, v_cache;
  std::vector<float> rope_table;
  std::vector<int32_t> block_table{2, 1, 0};
  std::vector<float> scale{0.3f};
  // Per head: two inter verticals, one successive, one intra, of which some lie inside of runs.
  std::vector<int32_t> verticals, vertical_count, runs, run_count;

  explicit Segment(int64_t head_dim) : dim(head_dim) {
    q = random_values<T>(kTokens * kHeads * dim, 1, 2.0f);
    k_cache = random_values<T>(3 * kKvHeads * kPageSize * dim, 2);
    v_cache = random_values<T>(3 * kKvHeads * kPageSize * dim, 3);
    for (int64_t i = 0; i < kKvHeads * kPageSize; ++i) {
      const bool beyond = i % kPageSize >= kEnd - 2 * kPageSize;
      for (int64_t d = 0; beyond && d < dim; ++d) {
        k_cache[static_cast<size_t>(i * dim + d)] = v_cache[static_cast<size_t>(i * dim + d)] =
            T(kNan);
      }
    }
    for (const float angle : random_values<float>(208 * dim / 2, 4, 3.14159265f)) {
      rope_table.push_back(std::cos(angle));
      rope_table.push_back(std::sin(angle));
    }
    for (int32_t h = 0; h < kHeads; ++h) {
      for (const int32_t v : {3 + h, 60, 100 + 7 * h, 200 + h}) verticals.push_back(v);
      for (const int32_t count : {2, 1, 1}) vertical_count.push_back(count);
      const int32_t lists[3][4] = {{150, 160, 230, 260}, {90, 110, 180, 181}, {0, 20, 0, 0}};
      for (const auto& list : lists) runs.insert(runs.end(), list, list + 4);
      for (const int32_t count : {2, 2, 1}) run_count.push_back(count);
    }
  }

  std::vector<T> prefill(BlockKernels kernels, int workers, int64_t first = 0,
                         int64_t count = kTokens) {
    std::vector<T> out(static_cast<size_t>(count * kHeads * dim), T(kNan));
    auto rows = test::view(q, {kTokens, kHeads, dim});
    rows.sizes[0] = count;
    rows.data = q.data() + first * kHeads * dim;
    sparse_prefill_cpu({.out = test::view(out, {count, kHeads, dim}),
                        .lse = {},
                        .q = rows,
                        .k_cache = test::view(k_cache, {3, kKvHeads, kPageSize, dim}),
                        .v_cache = test::view(v_cache, {3, kKvHeads, kPageSize, dim}),
                        .block_table = {block_table.data(), {1, 3}, {3, 1}},
                        .logit_scale = {scale.data(), {1}, {1}},
                        .rope_table = {rope_table.data(), {208, dim / 2, 2}, {dim, 2, 1}},
                        .verticals = {verticals.data(), {kHeads, 4}, {4, 1}},
                        .vertical_count = {vertical_count.data(), {kHeads, 3}, {3, 1}},
                        .runs = {runs.data(), {kHeads, 3, 2, 2}, {12, 4, 2, 1}},
                        .run_count = {run_count.data(), {kHeads, 3}, {3, 1}},
                        .scratch = {},
                        .q_begin = kBegin + first,
                        .segment_begin = kBegin,
                        .segment_end = kEnd,
                        .dual_chunk = kChunks,
                        .tile_tokens = 64},
                       threads(workers), kernels);
    return out;
  }

  /// vertical, then slash.
  std::vector<float> estimate(BlockKernels kernels, int workers, int64_t rows) {
    std::vector<float> sums(static_cast<size_t>(2 * kHeads * kEnd), kNan);
    auto last = test::view(q, {kTokens, kHeads, dim});
    last.sizes[0] = rows;
    last.data = q.data() + (kTokens - rows) * kHeads * dim;
    sparse_estimate_cpu({.vertical = {sums.data(), {kHeads, kEnd}, {kEnd, 1}},
                         .slash = {sums.data() + kHeads * kEnd, {kHeads, kEnd}, {kEnd, 1}},
                         .q = last,
                         .k_cache = test::view(k_cache, {3, kKvHeads, kPageSize, dim}),
                         .block_table = {block_table.data(), {1, 3}, {3, 1}},
                         .logit_scale = {scale.data(), {1}, {1}},
                         .rope_table = {rope_table.data(), {208, dim / 2, 2}, {dim, 2, 1}},
                         .segment_end = kEnd,
                         .dual_chunk = kChunks},
                        threads(workers), kernels);
    return sums;
  }
};

template <typename A>
float largest_difference(const std::vector<A>& a, const std::vector<A>& b) {
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(static_cast<float>(a[i]) - static_cast<float>(b[i]));
    largest = std::max(largest, std::isnan(difference) ? 1e30f : difference);
  }
  return largest;
}

template <typename T>
void check_prefill(int64_t dim, float allowed) {
  Segment<T> segment(dim);
  const std::vector<T> expected = segment.prefill(portable_kernels(test::dtype_of<T>()), 1);
  for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
    const std::vector<T> whole = segment.prefill(kernels, 1);
    EXPECT(largest_difference(whole, expected) <= allowed);
    for (const int workers : {2, 3}) {
      EXPECT(test::same_bits(whole, segment.prefill(kernels, workers)));
    }
    for (int width = 0; width < kernels.count; ++width) {
      EXPECT(test::same_bits(whole, segment.prefill({kernels.data + width, 1}, 2)));
    }
    for (const int64_t step : {1, 7, 50}) {
      for (int64_t first = 0; first < kTokens; first += step) {
        const int64_t count = std::min(step, kTokens - first);
        const auto begin = whole.begin() + first * kHeads * dim;
        const std::vector<T> rows(begin, begin + count * kHeads * dim);
        EXPECT(test::same_bits(rows, segment.prefill(kernels, 2, first, count)));
      }
    }
  }
}

Q1M_TEST(prefill_agrees_on_every_instruction_set) {
  for (const int64_t dim : {32, 48}) {
    check_prefill<float>(dim, 2e-5f);
    check_prefill<bf16>(dim, 2e-2f);
  }
}

template <typename T>
void check_estimate(int64_t dim, int64_t rows, float allowed) {
  Segment<T> segment(dim);
  const std::vector<float> expected =
      segment.estimate(portable_kernels(test::dtype_of<T>()), 1, rows);
  for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
    for (int width = 0; width < kernels.count; ++width) {
      const BlockKernels one{kernels.data + width, 1};
      const std::vector<float> sums = segment.estimate(one, 1, rows);
      EXPECT(largest_difference(sums, expected) <= allowed);
      EXPECT(test::same_bits(sums, segment.estimate(one, 3, rows)));
    }
  }
}

Q1M_TEST(estimate_agrees_on_every_instruction_set) {
  for (const int64_t rows : {1, 33, 64}) {
    check_estimate<float>(32, rows, 1e-5f);
    check_estimate<bf16>(48, rows, 2e-2f);
  }
}

}  // namespace
}  // namespace qwen1m
