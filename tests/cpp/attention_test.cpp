// prefill_attention and decode_attention on every compiled instruction set, against the definition
// in float64 and bit by bit against themselves.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "common/attention/block_kernel.h"
#include "inputs.h"
#include "kernels.h"
#include "ops/decode_attention/decode_attention_cpu.h"
#include "ops/prefill_attention/prefill_attention_cpu.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::kernels_for_prefill;
using test::NamedKernels;
using test::random_values;
using test::threads;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t q_heads, kv_heads, head_dim;
  int64_t chunk_size, local_size;
  std::vector<std::pair<int64_t, int64_t>> sequences;  // query rows, kv_len
  float logit_factor = 1;
};

struct Output {
  std::vector<double> out, lse;
};

/// A batch over a shuffled paged cache in which everything no token owns is NaN.
template <typename T>
struct Batch {
  Shape shape;
  DualChunk chunks;
  std::vector<T> q, k_cache, v_cache;
  std::vector<float> rope_table;
  std::vector<float> logit_scale, row_scale;  // of each sequence; for decode, of each row
  std::vector<int32_t> block_table;
  std::vector<int64_t> cu_q{0}, kv_len;
  int64_t tokens = 0, max_pages = 1, pages = 1, rope_rows = 1;

  explicit Batch(const Shape& s, uint64_t seed = 1)
      : shape(s), chunks{.chunk_size = s.chunk_size, .local_size = s.local_size} {
    const auto num_sequences = static_cast<int64_t>(s.sequences.size());
    for (const auto& [rows, length] : s.sequences) {
      cu_q.push_back(tokens += rows);
      kv_len.push_back(length);
      max_pages = std::max(max_pages, (length + kPageSize - 1) / kPageSize);
      pages += (length + kPageSize - 1) / kPageSize;
      rope_rows = std::max(rope_rows, chunks.table_rows(length));
      logit_scale.push_back(s.logit_factor * (1.0f + 0.1f * static_cast<float>(kv_len.size())) /
                            std::sqrt(static_cast<float>(s.head_dim)));
      for (int64_t row = 0; row < rows; ++row) {
        row_scale.push_back(logit_scale.back() * (1.0f + 0.15f * static_cast<float>(row)));
      }
    }
    q = random_values<T>(tokens * s.q_heads * s.head_dim, seed, 2.0f);
    const std::vector<float> angles =
        random_values<float>(rope_rows * (s.head_dim / 2), seed + 1, 3.14159265f);
    for (const float angle : angles) {
      rope_table.push_back(std::cos(angle));
      rope_table.push_back(std::sin(angle));
    }
    // Pages in a fixed odd order, page 0 unused.
    const int64_t page_elems = s.kv_heads * kPageSize * s.head_dim;
    k_cache.assign(static_cast<size_t>(pages * page_elems), T(kNan));
    v_cache = k_cache;
    block_table.assign(static_cast<size_t>(std::max<int64_t>(1, num_sequences * max_pages)), -7);
    const std::vector<T> k = random_values<T>(pages * page_elems, seed + 2, 1.0f);
    const std::vector<T> v = random_values<T>(pages * page_elems, seed + 3, 1.0f);
    int64_t next = 0;
    for (int64_t b = 0; b < num_sequences; ++b) {
      for (int64_t i = 0; i * kPageSize < kv_len[static_cast<size_t>(b)]; ++i, ++next) {
        const int64_t page = pages - 1 - next;
        block_table[static_cast<size_t>(b * max_pages + i)] = static_cast<int32_t>(page);
        const int64_t rows = std::min(kPageSize, kv_len[static_cast<size_t>(b)] - i * kPageSize);
        for (int64_t h = 0; h < s.kv_heads; ++h) {
          const int64_t at = (page * s.kv_heads + h) * kPageSize * s.head_dim;
          std::copy_n(k.begin() + at, rows * s.head_dim, k_cache.begin() + at);
          std::copy_n(v.begin() + at, rows * s.head_dim, v_cache.begin() + at);
        }
      }
    }
  }

  double key(const std::vector<T>& cache, int64_t b, int64_t token, int64_t h, int64_t d) const {
    const int64_t page = block_table[static_cast<size_t>(b * max_pages + token / kPageSize)];
    const int64_t row = (page * shape.kv_heads + h) * kPageSize + token % kPageSize;
    return static_cast<double>(
        static_cast<float>(cache[static_cast<size_t>(row * shape.head_dim + d)]));
  }

  /// Row `row` of q, rotated to `position`.
  std::vector<double> rotated(int64_t row, int64_t h, int64_t position) const {
    const int64_t half = shape.head_dim / 2;
    std::vector<double> result(static_cast<size_t>(shape.head_dim));
    for (int64_t d = 0; d < half; ++d) {
      const double c =
          static_cast<double>(rope_table[static_cast<size_t>((position * half + d) * 2)]);
      const double s =
          static_cast<double>(rope_table[static_cast<size_t>((position * half + d) * 2 + 1)]);
      const auto at = static_cast<size_t>((row * shape.q_heads + h) * shape.head_dim + d);
      const double a = static_cast<double>(static_cast<float>(q[at]));
      const double b = static_cast<double>(static_cast<float>(q[at + static_cast<size_t>(half)]));
      result[static_cast<size_t>(d)] = a * c - b * s;
      result[static_cast<size_t>(d + half)] = b * c + a * s;
    }
    return result;
  }

  /// The definition, in float64. scale_of(sequence, row of q)
  template <typename ScaleOf>
  Output reference(const ScaleOf& scale_of) const {
    Output result;
    const int64_t len = chunks.chunk_len();
    for (size_t b = 0; b < kv_len.size(); ++b) {
      for (int64_t row = cu_q[b]; row < cu_q[b + 1]; ++row) {
        const int64_t token = kv_len[b] - (cu_q[b + 1] - row);
        for (int64_t h = 0; h < shape.q_heads; ++h) {
          const int64_t kv_head = h / (shape.q_heads / shape.kv_heads);
          std::vector<double> o(static_cast<size_t>(shape.head_dim)), logits;
          const auto intra = rotated(row, h, token % len);
          const auto successive =
              token >= len ? rotated(row, h, std::min(token % len + len, shape.chunk_size)) : intra;
          const auto inter =
              token / len >= 2 ? rotated(row, h, std::min(2 * len - 1, shape.chunk_size)) : intra;
          for (int64_t j = 0; j <= token; ++j) {
            const int64_t distance = token / len - j / len;
            const auto& query = distance == 0 ? intra : distance == 1 ? successive : inter;
            double dot = 0;
            for (int64_t d = 0; d < shape.head_dim; ++d) {
              dot += query[static_cast<size_t>(d)] *
                     key(k_cache, static_cast<int64_t>(b), j, kv_head, d);
            }
            logits.push_back(dot * static_cast<double>(scale_of(b, static_cast<size_t>(row))));
          }
          const double m = logits.empty() ? 0 : *std::max_element(logits.begin(), logits.end());
          double l = 0;
          for (int64_t j = 0; j <= token; ++j) {
            const double p = std::exp(logits[static_cast<size_t>(j)] - m);
            l += p;
            for (int64_t d = 0; d < shape.head_dim; ++d) {
              o[static_cast<size_t>(d)] += p * key(v_cache, static_cast<int64_t>(b), j, kv_head, d);
            }
          }
          for (const double value : o) result.out.push_back(l == 0 ? 0 : value / l);
          result.lse.push_back(m + std::log(l));
        }
      }
    }
    return result;
  }
  Output prefill_reference() const {
    return reference([&](size_t b, size_t /*row*/) { return logit_scale[b]; });
  }
  Output decode_reference() const {
    return reference([&](size_t /*b*/, size_t row) { return row_scale[row]; });
  }
};

template <typename T>
struct Result {
  std::vector<T> out;
  std::vector<float> lse;
  bool operator==(const Result& other) const {
    return test::same_bits(out, other.out) && test::same_bits(lse, other.lse);
  }
};

/// Rows [begin, end) of every sequence of the batch in one call, the cache cut after `end`.
template <typename T>
Result<T> prefill(Batch<T>& batch, BlockKernels kernels, int workers, int64_t begin = 0,
                  int64_t end = std::numeric_limits<int64_t>::max()) {
  const Shape& s = batch.shape;
  std::vector<T> q;
  std::vector<int64_t> cu_q{0}, kv_len;
  for (size_t b = 0; b < batch.kv_len.size(); ++b) {
    const int64_t rows = batch.cu_q[b + 1] - batch.cu_q[b];
    const int64_t from = std::min(begin, rows), to = std::min(end, rows);
    const auto first = batch.q.begin() + batch.cu_q[b] * s.q_heads * s.head_dim;
    q.insert(q.end(), first + from * s.q_heads * s.head_dim, first + to * s.q_heads * s.head_dim);
    cu_q.push_back(cu_q.back() + to - from);
    kv_len.push_back(batch.kv_len[b] - (rows - to));
  }
  const int64_t tokens = cu_q.back(), num_sequences = static_cast<int64_t>(kv_len.size());
  Result<T> result{std::vector<T>(q.size(), T(kNan)),
                   std::vector<float>(static_cast<size_t>(tokens * s.q_heads), kNan)};
  prefill_attention_cpu(
      {.out = test::view(result.out, {tokens, s.q_heads, s.head_dim}),
       .lse = {result.lse.data(), {tokens, s.q_heads}, {s.q_heads, 1}},
       .q = test::view(q, {tokens, s.q_heads, s.head_dim}),
       .k_cache = test::view(batch.k_cache, {batch.pages, s.kv_heads, kPageSize, s.head_dim}),
       .v_cache = test::view(batch.v_cache, {batch.pages, s.kv_heads, kPageSize, s.head_dim}),
       .block_table = {batch.block_table.data(),
                       {num_sequences, batch.max_pages},
                       {batch.max_pages, 1}},
       .cu_q = {cu_q.data(), {num_sequences + 1}, {1}},
       .kv_len = {kv_len.data(), {num_sequences}, {1}},
       .logit_scale = {batch.logit_scale.data(), {num_sequences}, {1}},
       .rope_table = {batch.rope_table.data(),
                      {batch.rope_rows, s.head_dim / 2, 2},
                      {s.head_dim, 2, 1}},
       .dual_chunk = batch.chunks},
      threads(workers), kernels);
  return result;
}

/// All sequences have the same number of query rows.
template <typename T>
Result<T> decode(Batch<T>& batch, BlockKernels kernels, int workers) {
  const Shape& s = batch.shape;
  const auto num_sequences = static_cast<int64_t>(batch.kv_len.size());
  const int64_t q_tokens = batch.tokens / num_sequences;
  Result<T> result{std::vector<T>(batch.q.size(), T(kNan)),
                   std::vector<float>(static_cast<size_t>(batch.tokens * s.q_heads), kNan)};
  decode_attention_cpu(
      {.out = test::view(result.out, {num_sequences, q_tokens, s.q_heads, s.head_dim}),
       .lse = {result.lse.data(),
               {num_sequences, q_tokens, s.q_heads},
               {q_tokens * s.q_heads, s.q_heads, 1}},
       .q = test::view(batch.q, {num_sequences, q_tokens, s.q_heads, s.head_dim}),
       .k_cache = test::view(batch.k_cache, {batch.pages, s.kv_heads, kPageSize, s.head_dim}),
       .v_cache = test::view(batch.v_cache, {batch.pages, s.kv_heads, kPageSize, s.head_dim}),
       .block_table = {batch.block_table.data(),
                       {num_sequences, batch.max_pages},
                       {batch.max_pages, 1}},
       .kv_len = {batch.kv_len.data(), {num_sequences}, {1}},
       .logit_scale = {batch.row_scale.data(), {num_sequences, q_tokens}, {q_tokens, 1}},
       .rope_table = {batch.rope_table.data(),
                      {batch.rope_rows, s.head_dim / 2, 2},
                      {s.head_dim, 2, 1}},
       .dual_chunk = batch.chunks},
      threads(workers), kernels);
  return result;
}

/// Those of decode, and those of prefill: a decode call takes any.
template <typename T>
std::vector<NamedKernels> kernels_for_decode() {
  std::vector<NamedKernels> all = kernels_for_prefill<T>();
#if Q1M_HAVE_AVX512
  if (cpu_isa() >= CpuIsa::kAvx512) {
    all.push_back({"avx512_decode", avx512_decode_kernels(test::dtype_of<T>())});
  }
#endif
#if Q1M_HAVE_AVX512BF16
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) {
    all.push_back({"avx512_bf16_decode", avx512_bf16_decode_kernels(test::dtype_of<T>())});
  }
#endif
  std::erase_if(all, [](const NamedKernels& k) { return k.kernels.count == 0; });
  return all;
}

void expect_close(const std::string& what, double got, double expected, double tolerance) {
  // NaN fails; equal infinities pass.
  const bool ok = got == expected || std::abs(got - expected) <= tolerance;
  test::report(ok, __FILE__, __LINE__,
               what + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <typename T>
void check(const std::string& name, const Shape& shape, const Result<T>& got,
           const Output& expected, double factor) {
  // bf16 outputs are rounded to 2^-9 of values below 1, and so are the rotated queries: an error of
  // 2^-9 |q k| scale in a logit, hence the factor for shapes with large logits.
  const double tolerance = (sizeof(T) == 4 ? 2e-6 : 8e-3) * factor;
  const std::string at = name + " D" + std::to_string(shape.head_dim) + " kv" +
                         std::to_string(shape.sequences.back().second) + " chunk" +
                         std::to_string(shape.chunk_size - shape.local_size);
  for (size_t i = 0; i < expected.out.size(); ++i) {
    expect_close(at + " out[" + std::to_string(i) + "]",
                 static_cast<double>(static_cast<float>(got.out[i])), expected.out[i], tolerance);
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    expect_close(at + " lse[" + std::to_string(i) + "]", static_cast<double>(got.lse[i]),
                 expected.lse[i], tolerance);
  }
}

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = [] {
    std::vector<Shape> s;
    for (const int64_t n : {1, 63, 64, 65, 127, 128, 129, 200}) {
      s.push_back({2, 1, 64, kInfiniteChunk, 0, {{n, n}}});
    }
    // Chunks: below, at and above a page; odd; of one token; with the clamp of local_size.
    s.push_back({4, 2, 32, 48, 8, {{300, 300}}});
    s.push_back({2, 2, 16, 144, 16, {{40, 401}}});
    s.push_back({2, 1, 64, 113, 13, {{150, 333}}});
    s.push_back({2, 1, 16, 2, 1, {{140, 140}}});
    s.push_back({2, 1, 16, 10, 3, {{70, 140}}});
    s.push_back({2, 1, 32, 100, 70, {{100, 200}}});
    s.push_back({2, 1, 32, 64, 0, {{60, 200}}});
    // GQA ratios, head dims.
    s.push_back({3, 3, 48, 112, 16, {{50, 130}}});
    s.push_back({6, 2, 80, 112, 16, {{50, 130}}});
    s.push_back({5, 1, 128, 256, 32, {{40, 300}}});
    s.push_back({14, 2, 128, 256, 32, {{40, 300}}});
    s.push_back({16, 1, 112, 112, 16, {{20, 260}}});
    s.push_back({2, 1, 256, 112, 16, {{130, 130}}});
    s.push_back({2, 1, 96, 112, 16, {{30, 130}}});
    // Batches.
    s.push_back({4, 2, 64, 112, 16, {{5, 5}, {1, 300}, {0, 0}, {129, 129}, {3, 64}, {70, 430}}});
    s.push_back({4, 2, 64, 112, 16, {{60, 300}}, 6.0f});
    return s;
  }();
  return all;
}

template <typename T>
void check_prefill() {
  for (const Shape& shape : shapes()) {
    Batch<T> batch(shape);
    const Output expected = batch.prefill_reference();
    for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
      check(name, shape, prefill(batch, kernels, 2), expected, shape.logit_factor);
    }
  }
}
Q1M_TEST(prefill_matches_float64_in_fp32) { check_prefill<float>(); }
Q1M_TEST(prefill_matches_float64_in_bf16) { check_prefill<bf16>(); }

template <typename T>
void check_decode() {
  const std::vector<Shape> all{
      {2,
       1,
       64,
       kInfiniteChunk,
       0,
       {{1, 1}, {1, 63}, {1, 64}, {1, 65}, {1, 127}, {1, 128}, {1, 129}}},
      {4, 2, 64, 112, 16, {{1, 97}, {1, 1024}, {1, 1025}, {1, 2100}, {1, 3}}},
      {14, 2, 128, 256, 32, {{1, 700}, {1, 449}}},
      {16, 1, 16, 48, 8, {{1, 90}}},
      {16, 1, 16, 48, 8, {{4, 90}, {4, 41}, {4, 4}}},  // tiles cut at a chunk border
      {2, 1, 32, 2, 1, {{3, 130}, {3, 3}}},
      {3, 3, 80, 113, 13, {{2, 260}, {2, 2000}}},
      {1, 1, 256, 112, 16, {{1, 300}}},
      {4, 1, 112, 112, 16, {{1, 300}}},
      {5, 1, 48, 112, 16, {{1, 301}, {1, 1023}}},
      {6, 2, 32, 112, 16, {{3, 301}, {3, 40}}},  // 9 rows
      {4, 2, 64, 112, 16, {{1, 3000}}, 6.0f},
  };
  for (const Shape& shape : all) {
    Batch<T> batch(shape);
    const Output expected = batch.decode_reference();
    for (const auto& [name, kernels] : kernels_for_decode<T>()) {
      const Result<T> got = decode(batch, kernels, 2);
      check(name, shape, got, expected, shape.logit_factor);
      EXPECT(got == decode(batch, kernels, 1));
      for (int width = 0; width < kernels.count; ++width) {
        EXPECT(got == decode(batch, {kernels.data + width, 1}, 2));
      }
      EXPECT(got == decode(batch, kernels, 3));
    }
  }
}
Q1M_TEST(decode_matches_float64_in_fp32) { check_decode<float>(); }
Q1M_TEST(decode_matches_float64_in_bf16) { check_decode<bf16>(); }

template <typename T>
void check_empty() {
  Batch<T> batch({4, 2, 64, 112, 16, {{2, 150}, {2, 2}}});
  batch.kv_len[1] = 0;
  for (const auto& [name, kernels] : kernels_for_decode<T>()) {
    const Result<T> got = decode(batch, kernels, 2);
    for (size_t i = got.out.size() / 2; i < got.out.size(); ++i) {
      EXPECT(static_cast<float>(got.out[i]) == 0.0f);
    }
    for (size_t i = got.lse.size() / 2; i < got.lse.size(); ++i) {
      EXPECT(got.lse[i] == -std::numeric_limits<float>::infinity());
    }
    EXPECT(std::isfinite(got.lse[0]));
  }
}
Q1M_TEST(an_empty_sequence_gives_zero_and_minus_infinity) {
  check_empty<float>();
  check_empty<bf16>();
}

/// A call over the whole prompt gives the bits of any sequence of calls over pieces of it, which
/// see a shorter cache; threads and the width of the lane block (part of the tile cut) do not show.
template <typename T>
void check_bits() {
  const std::vector<Shape> all{
      {4, 2, 64, kInfiniteChunk, 0, {{260, 260}}}, {14, 2, 128, 113, 13, {{150, 300}}},
      {2, 1, 80, 48, 8, {{140, 140}, {33, 200}}},  {3, 3, 16, 10, 3, {{70, 70}}},
      {2, 1, 64, 256, 32, {{129, 600}}, 6.0f},
  };
  for (const Shape& shape : all) {
    Batch<T> batch(shape);
    for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
      const Result<T> whole = prefill(batch, kernels, 1);
      for (const int workers : {2, 3, 8}) EXPECT(whole == prefill(batch, kernels, workers));
      for (int width = 0; width < kernels.count; ++width) {
        EXPECT(whole == prefill(batch, {kernels.data + width, 1}, 2));
      }
      // Software tiles are slow, and one step meets their tile edges as well.
      const bool slow = name.starts_with("amx_software");
      for (const int64_t step :
           slow ? std::vector<int64_t>{48} : std::vector<int64_t>{1, 7, 48, 129}) {
        for (int64_t begin = 0; begin < 300; begin += step < 8 ? 5 * step + 6 : step) {
          const Result<T> part = prefill(batch, kernels, 2, begin, begin + step);
          // Where the rows of this part are in `whole`: sequence by sequence.
          size_t at = 0;
          const auto row_elems = static_cast<size_t>(shape.q_heads * shape.head_dim);
          for (size_t b = 0; b < batch.kv_len.size(); ++b) {
            const int64_t rows = batch.cu_q[b + 1] - batch.cu_q[b];
            for (int64_t r = begin; r < std::min(begin + step, rows); ++r, ++at) {
              const auto row = static_cast<size_t>(batch.cu_q[b] + r);
              EXPECT(std::memcmp(&part.out[at * row_elems], &whole.out[row * row_elems],
                                 row_elems * sizeof(T)) == 0);
              EXPECT(std::memcmp(&part.lse[at * static_cast<size_t>(shape.q_heads)],
                                 &whole.lse[row * static_cast<size_t>(shape.q_heads)],
                                 static_cast<size_t>(shape.q_heads) * 4) == 0);
            }
          }
          EXPECT_EQ(at * row_elems, part.out.size());
        }
      }
    }
  }
}
Q1M_TEST(bits_do_not_depend_on_cut_threads_or_width_in_fp32) { check_bits<float>(); }
Q1M_TEST(bits_do_not_depend_on_cut_threads_or_width_in_bf16) { check_bits<bf16>(); }

/// The tiles of a thread have several users: torch's matrix products keep a configuration of their
/// own between calls. Neither side may see the other's.
Q1M_TEST(tiles_are_shared_with_another_user) {
  constexpr int kBytes = kSavedStateBytes;
  struct User {  // 8 rows of 32 bytes, as amx_tiles.h lays a configuration out
    alignas(64) std::array<uint8_t, kBytes> config{1};
    User() {
      for (size_t tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 32, config[48 + tile] = 8;
    }
  };
  std::vector<NamedKernels> all{{"amx_software", amx_software_kernels(DType::kBFloat16)}};
#if Q1M_HAVE_AMX
  if (cpu_isa() >= CpuIsa::kAmx) all.push_back({"amx", amx_kernels(DType::kBFloat16)});
#endif
  Batch<bf16> batch({4, 2, 64, 113, 13, {{60, 300}}});
  for (const auto& [name, kernels] : all) {
    const BlockKernel& kernel = *kernels.begin();
    const Result<bf16> alone = prefill(batch, kernels, 1);
    const User user;
    alignas(64) std::array<uint8_t, kBytes> before{}, found{};
    kernel.begin(before.data());
    for (int round = 0; round < 3; ++round) {
      kernel.end(user.config.data());  // the other user configures the tiles of this thread
      EXPECT(prefill(batch, kernels, 1) == alone);
      kernel.begin(found.data());  // what it finds when it goes on
      EXPECT(found == user.config);
    }
    kernel.end(before.data());
  }
}

template <typename T>
void check_nan() {
  Batch<T> batch({2, 1, 32, 112, 16, {{60, 200}}});
  // Row 10, head 0 is NaN, and so is its result; no other row notices.
  for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
    const Result<T> before = prefill(batch, kernels, 1);
    Batch<T> broken = batch;
    broken.q[10 * 64] = T(kNan);
    const Result<T> after = prefill(broken, kernels, 1);
    for (size_t i = 0; i < before.out.size(); ++i) {
      const bool poisoned = i / 32 == 20;
      EXPECT(poisoned ? std::isnan(static_cast<float>(after.out[i]))
                      : std::memcmp(&after.out[i], &before.out[i], sizeof(T)) == 0);
    }
  }
}
Q1M_TEST(a_nan_query_gives_nan_and_stays_in_its_row) {
  check_nan<float>();
  check_nan<bf16>();
}

/// Pages more than 2^31 elements into the cache, in memory that is reserved but never touched.
template <typename T>
void check_far_pages() {
  Batch<T> batch({2, 1, 64, 112, 16, {{10, 200}}});
  const int64_t page_elems = kPageSize * 64, far = (int64_t{1} << 31) / page_elems + 5;
  const int64_t total = far + batch.pages;
  const auto bytes = static_cast<size_t>(total * page_elems) * sizeof(T);
  const auto reserve = [&] {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
  };
  T *k = reserve(), *v = reserve();
  EXPECT(k != nullptr && v != nullptr);
  if (k == nullptr || v == nullptr) return;
  std::copy(batch.k_cache.begin(), batch.k_cache.end(), k + far * page_elems);
  std::copy(batch.v_cache.begin(), batch.v_cache.end(), v + far * page_elems);
  std::vector<int32_t> table = batch.block_table;
  for (int32_t& page : table) page += static_cast<int32_t>(far);
  for (const auto& [name, kernels] : kernels_for_prefill<T>()) {
    const Result<T> near = prefill(batch, kernels, 1);
    Result<T> got{std::vector<T>(near.out.size()), {}};
    const AnyView<4> k_view{
        k, test::dtype_of<T>(), {total, 1, kPageSize, 64}, {page_elems, page_elems, 64, 1}};
    AnyView<4> v_view = k_view;
    v_view.data = v;
    prefill_attention_cpu(
        {.out = test::view(got.out, {10, 2, 64}),
         .lse = {},
         .q = test::view(batch.q, {10, 2, 64}),
         .k_cache = k_view,
         .v_cache = v_view,
         .block_table = {table.data(), {1, batch.max_pages}, {batch.max_pages, 1}},
         .cu_q = {batch.cu_q.data(), {2}, {1}},
         .kv_len = {batch.kv_len.data(), {1}, {1}},
         .logit_scale = {batch.logit_scale.data(), {1}, {1}},
         .rope_table = {batch.rope_table.data(), {batch.rope_rows, 32, 2}, {64, 2, 1}},
         .dual_chunk = batch.chunks},
        threads(1), kernels);
    EXPECT(test::same_bits(got.out, near.out));
  }
  munmap(k, bytes);
  munmap(v, bytes);
}
Q1M_TEST(offsets_beyond_2_to_the_31) {
  check_far_pages<float>();
  check_far_pages<bf16>();
}

Q1M_TEST(errors_name_argument_expectation_and_value) {
  Batch<float> batch({4, 2, 64, 112, 16, {{5, 100}}});
  batch.kv_len[0] = 129;
  EXPECT_ERROR(
      "prefill_attention: kv_len[0]: expected a length in [0, max_pages * 128 = 128], got 129",
      prefill(batch, portable_kernels(DType::kFloat32), 1));
  batch.kv_len[0] = 100;
  batch.block_table[0] = 2;
  EXPECT_ERROR("prefill_attention: block_table[0, 0]: expected a page in [0, pages = 2), got 2",
               prefill(batch, portable_kernels(DType::kFloat32), 1));
  EXPECT_ERROR("decode_attention: block_table[0, 0]: expected a page in [0, pages = 2), got 2",
               decode(batch, portable_kernels(DType::kFloat32), 1));
  batch.block_table[0] = 1;
  batch.kv_len[0] = 4;
  EXPECT_ERROR(
      "prefill_attention: kv_len[0]: expected at least the 5 query rows of the sequence, got 4",
      prefill(batch, portable_kernels(DType::kFloat32), 1));
  EXPECT_ERROR(
      "decode_attention: kv_len[0]: expected 0, or at least the q_tokens = 5 query rows, got 4",
      decode(batch, portable_kernels(DType::kFloat32), 1));
}

}  // namespace
}  // namespace qwen1m
