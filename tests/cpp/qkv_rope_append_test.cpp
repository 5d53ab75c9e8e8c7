#include "qwen1m/qkv_rope_append.h"

#include <cmath>

#include "inputs.h"
#include "qwen1m/dual_chunk.h"
#include "test.h"

namespace qwen1m {
namespace {

using test::random_values;
using test::view;

/// Arguments that fit, over storage that lives as long as they do.
template <typename T>
struct Case {
  int64_t tokens, q_heads, kv_heads, head_dim, chunk_len;
  int64_t pages = 3, rows = chunk_len, columns = (q_heads + 2 * kv_heads) * head_dim;
  int64_t cache_elems = pages * kv_heads * kPageSize * head_dim;
  std::vector<T> q = std::vector<T>(static_cast<size_t>(tokens * q_heads * head_dim));
  std::vector<T> k = std::vector<T>(static_cast<size_t>(cache_elems), T(5.0f)), v = k;
  std::vector<T> qkv = random_values<T>(tokens * (columns + 3), 1);
  std::vector<T> bias = random_values<T>(columns, 2, 100.0f);
  std::vector<int64_t> positions = {}, slots = {};
  std::vector<float> table = random_values<float>(rows * head_dim, 3);

  QkvRopeAppendParams params() {
    for (int64_t t = 0; t < tokens; ++t) {
      positions.push_back(1'000'003 + 7 * t);
      slots.push_back(t % 5 == 3 ? -1 : t * 37 % (pages * kPageSize));  // 37: no slot twice
    }
    return {.q = view(q, {tokens, q_heads, head_dim}),
            .k_cache = view(k, {pages, kv_heads, kPageSize, head_dim}),
            .v_cache = view(v, {pages, kv_heads, kPageSize, head_dim}),
            .qkv = view(qkv, {tokens, columns}, columns + 3),
            .bias = view(bias, {columns}),
            .positions = {positions.data(), {tokens}, {1}},
            .slot_mapping = {slots.data(), {tokens}, {1}},
            .rope_table = {table.data(), {rows, head_dim / 2, 2}, {head_dim, 2, 1}},
            .chunk_len = chunk_len};
  }
};

template <typename T>
bool near(T got, double expected) {
  const double error = std::abs(static_cast<float>(got) - expected);
  return error <= (sizeof(T) == 4 ? 4e-5 : 0.6);  // values up to 200: bf16 steps of 1
}

template <typename T>
void check_against_double(Case<T> c, bool has_bias) {
  auto p = c.params();
  if (!has_bias) p.bias = {};
  qkv_rope_append_cpu(p, test::threads(2));
  const auto input = [&](int64_t t, int64_t column) {
    const double x = static_cast<float>(c.qkv[static_cast<size_t>(t * (c.columns + 3) + column)]);
    return has_bias ? x + static_cast<float>(c.bias[static_cast<size_t>(column)]) : x;
  };
  std::vector<bool> written(c.k.size());
  const int64_t half = c.head_dim / 2;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const int64_t q_columns = c.q_heads * c.head_dim;
    for (int64_t i = 0; i < q_columns; ++i) {
      EXPECT(near(c.q[static_cast<size_t>(t * q_columns + i)], input(t, i)));
    }
    const int64_t slot = c.slots[static_cast<size_t>(t)];
    if (slot < 0) continue;
    const int64_t position = c.positions[static_cast<size_t>(t)] % c.chunk_len;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      const int64_t to =
          ((slot / kPageSize * c.kv_heads + h) * kPageSize + slot % kPageSize) * c.head_dim;
      const int64_t k0 = q_columns + h * c.head_dim, v0 = k0 + c.kv_heads * c.head_dim;
      for (int64_t i = 0; i < c.head_dim; ++i) {
        const auto* pair = &c.table[static_cast<size_t>((position * half + i % half) * 2)];
        const double a = input(t, k0 + i % half), b = input(t, k0 + half + i % half);
        const double rotated = i < half ? a * pair[0] - b * pair[1] : b * pair[0] + a * pair[1];
        EXPECT(near(c.k[static_cast<size_t>(to + i)], rotated));
        EXPECT(near(c.v[static_cast<size_t>(to + i)], input(t, v0 + i)));
        written[static_cast<size_t>(to + i)] = true;
      }
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    EXPECT(written[i] || (static_cast<float>(c.k[i]) == 5 && static_cast<float>(c.v[i]) == 5));
  }
}

Q1M_TEST(matches_double) {
  for (const bool has_bias : {true, false}) {
    check_against_double<float>({11, 4, 2, 16, 5}, has_bias);
    check_against_double<bf16>({11, 4, 2, 16, 5}, has_bias);
    check_against_double<float>({40, 7, 1, 80, 1000}, has_bias);
    check_against_double<bf16>({40, 7, 1, 128, 1000}, has_bias);
    check_against_double<float>({1, 1, 1, 2, 1}, has_bias);
    check_against_double<bf16>({30, 0, 2, 64, 77}, has_bias);  // only K and V
    check_against_double<float>({0, 4, 2, 16, 5}, has_bias);
  }
}

Q1M_TEST(a_token_does_not_depend_on_the_others_or_on_threads) {
  Case<bf16> together{120, 28, 4, 128, 1000}, alone = together;
  qkv_rope_append_cpu(together.params(), test::threads(3));
  const auto all = alone.params();
  for (int64_t t = 0; t < 120; ++t) {
    auto p = all;
    p.q.data = p.q.as<bf16>().at(t);
    p.qkv.data = p.qkv.as<bf16>().at(t);
    p.positions.data += t;
    p.slot_mapping.data += t;
    p.q.sizes[0] = p.qkv.sizes[0] = p.positions.sizes[0] = p.slot_mapping.sizes[0] = 1;
    qkv_rope_append_cpu(p, {});
  }
  EXPECT(test::same_bits(together.q, alone.q));
  EXPECT(test::same_bits(together.k, alone.k));
  EXPECT(test::same_bits(together.v, alone.v));
}

Q1M_TEST(the_bits_do_not_depend_on_the_instruction_set) {
  Case<float> c{9, 3, 1, 80, 50};
  qkv_rope_append_cpu(c.params(), {});
  EXPECT_EQ(test::fingerprint(c.v, test::fingerprint(c.k, test::fingerprint(c.q))),
            6391527160353790196u);
}

Q1M_TEST(an_error_leaves_the_cache_alone) {
  Case<float> c{11, 4, 2, 16, 5};
  const auto p = c.params();
  const auto before = c.k;
  c.slots[10] = 3 * kPageSize;
  EXPECT_ERROR(
      "qkv_rope_append: slot_mapping[10]: expected -1 or a slot below pages * 128 = 384, got 384",
      qkv_rope_append_cpu(p, {}));
  c.slots[10] = -2;
  EXPECT_ERROR(
      "qkv_rope_append: slot_mapping[10]: expected -1 or a slot below pages * 128 = 384, got -2",
      qkv_rope_append_cpu(p, {}));
  c.slots[10] = 1;
  c.positions[10] = -1;
  EXPECT_ERROR(
      "qkv_rope_append: positions[10]: expected a position >= 0 with position % chunk_len (5) "
      "below the 5 rows of rope_table, got -1",
      qkv_rope_append_cpu(p, {}));
  c.slots[10] = -1;  // its position is then not read
  EXPECT(test::same_bits(before, c.k));
  qkv_rope_append_cpu(p, {});
}

Q1M_TEST(errors_name_the_argument) {
  Case<float> c{11, 4, 2, 16, 5};
  const auto good = c.params();
  auto p = good;
  p.k_cache = view(c.k, {3, 2, 64, 16});
  EXPECT_ERROR(
      "qkv_rope_append: k_cache: expected shape [pages, kv_heads, 128, D=16], got [3, 2, 64, 16]",
      qkv_rope_append_cpu(p, {}));
  p = good;
  p.v_cache = view(c.v, {2, 2, 128, 16});
  EXPECT_ERROR(
      "qkv_rope_append: v_cache: expected shape [pages=3, kv_heads=2, 128, D=16], got "
      "[2, 2, 128, 16]",
      qkv_rope_append_cpu(p, {}));
  p = good;
  p.qkv.sizes[1] = 127;
  EXPECT_ERROR(
      "qkv_rope_append: qkv: expected shape [tokens=11, (q_heads + 2 kv_heads) D=128], got "
      "[11, 127]",
      qkv_rope_append_cpu(p, {}));
  p = good;
  p.q.strides[1] = 17;
  EXPECT_ERROR(
      "qkv_rope_append: q: expected the last 2 dimensions contiguous, got shape [11, 4, 16] with "
      "strides [64, 17, 1]",
      qkv_rope_append_cpu(p, {}));
  p = good;
  p.rope_table.sizes[0] = 4;
  c.slots[3] = 7;
  EXPECT_ERROR(
      "qkv_rope_append: positions[3]: expected a position >= 0 with position % chunk_len (5) "
      "below the 4 rows of rope_table, got 1000024",
      qkv_rope_append_cpu(p, {}));
  p = good;
  p.chunk_len = 0;
  EXPECT_ERROR("qkv_rope_append: chunk_len: expected a number of tokens > 0, got 0",
               qkv_rope_append_cpu(p, {}));
}

}  // namespace
}  // namespace qwen1m
