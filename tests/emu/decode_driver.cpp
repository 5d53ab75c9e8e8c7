// Runs an emulated decode_attention kernel on one hard case and compares it with the definition in
// float64. test_mutants.py compiles this file again for each broken kernel.
//
//   decode_driver <sm80|sm90> <head_dim, with an fp8 cache: head_dim-fp8> <first seed> <seeds>
//
// -DDRIVER_SM90=0|1, -DDRIVER_DIM=64|128 and -DDRIVER_FP8=0|1 leave out the other kernels: it
// compiles faster.
//
// The case: three sequences, one of them empty, the longest with Dual Chunk borders inside pages
// and between its query tokens; 7 query heads of one KV head, once with 1 query token (16 rows a
// block) and once with 3 (32 rows; with fp8 two blocks of 16), several splits, NaN wherever nothing
// may be read, one scratch for all launches. Output as prefill_driver's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "attention_case.h"
#include "ops/decode_attention/decode_attention_launch.h"
#include "qwen1m/error.h"

namespace qwen1m {
namespace {

using test::Buffer;
using test::kChunks;
using test::kNan;

// 2914 = 14 * 208 + 2: of three query tokens the first lies in another chunk than the others. 640
// ends a step, so that only the order of the tokens hides keys in it.
constexpr int64_t kLengths[] = {640, 0, 2914}, kBatch = 3, kHeads = 7, kMaxPages = 24;
constexpr int kNumSms = 3;                                 // 6 splits of a long sequence
constexpr float kKeyScale = 0.25f, kValueScale = 0.0625f;  // of the fp8 cache

#ifdef DRIVER_SM90
constexpr int kOnlySm90 = DRIVER_SM90, kOnlyDim = DRIVER_DIM, kOnlyFp8 = DRIVER_FP8;
#else
constexpr int kOnlySm90 = -1, kOnlyDim = -1, kOnlyFp8 = -1;
#endif

template <typename Kernel, typename Params>
arch::emu::Report launch(const Params& params, uint64_t seed) {
  return arch::emu::launch({.blocks = params.launch.num_blocks(),
                            .threads = Kernel::kThreads,
                            .shared_bytes = sizeof(typename Kernel::Smem)},
                           [&] { Kernel::run(params); }, {.seed = seed});
}

template <int kHeadDim, int kRowTiles, typename Cache>
arch::emu::Report launch(bool sm90, const DecodeLaunch& plan, uint64_t seed) {
  if constexpr ((kOnlyDim < 0 || kOnlyDim == kHeadDim) &&
                (kOnlyFp8 < 0 || kOnlyFp8 == int{sizeof(Cache) == 1})) {
    if constexpr (kOnlySm90 != 1) {
      using Kernel = DecodeAttentionSm80<kHeadDim, kRowTiles, Cache>;
      if (!sm90) return launch<Kernel>(typename Kernel::Params{plan}, seed);
    }
    if constexpr (kOnlySm90 != 0) {
      using Kernel = DecodeAttentionSm90<kHeadDim, kRowTiles, Cache>;
      const typename Kernel::Params params{
          plan, arch::emu::make_tensor_map(page_map(plan.args.k_cache, Kernel::kKeys)),
          arch::emu::make_tensor_map(page_map(plan.args.v_cache, Kernel::kKeys))};
      if (sm90) return launch<Kernel>(params, seed);
    }
  }
  throw Error("this driver was compiled without that kernel");
}

arch::emu::Report launch(int64_t dim, bool fp8, bool sm90, const DecodeLaunch& plan,
                         uint64_t seed) {
  const bool many_rows = plan.rows == 32;
  const auto kernel = fp8          ? (dim == 128 ? launch<128, 1, e4m3> : launch<64, 1, e4m3>)
                      : dim == 128 ? (many_rows ? launch<128, 2, bf16> : launch<128, 1, bf16>)
                                   : (many_rows ? launch<64, 2, bf16> : launch<64, 1, bf16>);
  return kernel(sm90, plan, seed);
}

/// Codes of a cache; its values become what they stand for, which bf16 holds.
std::vector<e4m3> quantise(std::vector<bf16>& values, float scale) {
  std::vector<e4m3> codes;
  for (bf16& value : values) {
    codes.emplace_back(static_cast<float>(value) / scale);
    value = bf16(static_cast<float>(codes.back()) * scale);
  }
  return codes;
}

struct Outcome {
  double error = 0, lse_error = 0;
  std::set<std::string> messages;

  void add(const arch::emu::Report& report) {
    if (!report.completed) error = kNan;
    for (const auto& issue : report.issues) {
      if (messages.insert(issue.message).second) {
        std::printf("issue %s %s\n", issue.kind.c_str(), issue.message.c_str());
      }
    }
  }
};

void run(bool sm90, int64_t dim, bool fp8, int64_t q_tokens, uint64_t first_seed, uint64_t seeds,
         Buffer<uint8_t>& scratch, Outcome& outcome) {
  const int64_t row_elems = kHeads * dim;
  std::vector<test::Sequence> sequences;
  std::vector<int32_t> table(static_cast<size_t>(kBatch * kMaxPages), -1);
  std::vector<bf16> all_q(static_cast<size_t>(kBatch * q_tokens * row_elems), bf16(kNan));
  const int64_t num_pages = kBatch * kMaxPages;
  std::vector<bf16> keys(static_cast<size_t>(num_pages * kPageSize * dim), bf16(kNan));
  std::vector<bf16> values = keys;
  for (int64_t b = 0; b < kBatch; ++b) {
    sequences.emplace_back(kLengths[b], kLengths[b] == 0 ? 0 : q_tokens, kHeads, dim,
                           static_cast<uint64_t>(10 * b + 1));
    test::Sequence& s = sequences.back();
    s.logit_scale *= 1.0f - 0.125f * static_cast<float>(b);
    s.row_step = -0.25f * s.logit_scale;
    if (fp8) {
      quantise(s.k, kKeyScale);
      quantise(s.v, kValueScale);
    }
    std::vector<int32_t> pages;
    for (int64_t i = 0; i * kPageSize < s.kv_len; ++i) {
      pages.push_back(static_cast<int32_t>((i * 5 + b) % kMaxPages * kBatch + b));
    }
    std::copy(pages.begin(), pages.end(), table.begin() + b * kMaxPages);
    std::copy(s.q.begin(), s.q.end(), all_q.begin() + b * q_tokens * row_elems);
    s.put(s.k, pages, keys);
    s.put(s.v, pages, values);
  }
  Buffer<bf16> q(all_q, "q"), k(keys, "k_cache"), v(values, "v_cache");
  Buffer<e4m3> k_codes(quantise(keys, kKeyScale), "k_cache in fp8");
  Buffer<e4m3> v_codes(quantise(values, kValueScale), "v_cache in fp8");
  Buffer<float> k_scale({kKeyScale}, "k_scale"), v_scale({kValueScale}, "v_scale");
  Buffer<int32_t> block_table(table, "block_table");
  Buffer<int64_t> kv_len({std::begin(kLengths), std::end(kLengths)}, "kv_len");
  std::vector<float> scales;
  for (const test::Sequence& s : sequences) {
    for (int64_t row = 0; row < q_tokens; ++row) scales.push_back(s.scale(row));
  }
  Buffer<float> scale(scales, "logit_scale");
  Buffer<float> rope(sequences[0].table, "rope_table");
  Buffer<bf16> out(std::vector<bf16>(all_q.size()), "out", true);
  Buffer<float> lse(std::vector<float>(static_cast<size_t>(kBatch * q_tokens * kHeads)), "lse",
                    true);
  DecodeAttentionParams p{
      .out = test::view(out.values, {kBatch, q_tokens, kHeads, dim}),
      .lse = {lse.values.data(), {kBatch, q_tokens, kHeads}, {q_tokens * kHeads, kHeads, 1}},
      .q = test::view(q.values, {kBatch, q_tokens, kHeads, dim}),
      .k_cache = test::view(k.values, {num_pages, 1, kPageSize, dim}),
      .v_cache = test::view(v.values, {num_pages, 1, kPageSize, dim}),
      .block_table = {block_table.values.data(), {kBatch, kMaxPages}, {kMaxPages, 1}},
      .kv_len = {kv_len.values.data(), {kBatch}, {1}},
      .logit_scale = {scale.values.data(), {kBatch, q_tokens}, {q_tokens, 1}},
      .rope_table = {rope.values.data(), {kChunks.chunk_size + 1, dim / 2, 2}, {dim, 2, 1}},
      .dual_chunk = kChunks,
      .scratch = {scratch.values.data(), {static_cast<int64_t>(scratch.values.size())}, {1}}};
  if (fp8) {
    p.k_cache.data = k_codes.values.data();
    p.v_cache.data = v_codes.values.data();
    p.k_cache.dtype = p.v_cache.dtype = DType::kFloat8E4M3;
    p.k_scale = {k_scale.values.data(), {1}, {1}};
    p.v_scale = {v_scale.values.data(), {1}, {1}};
  }
  const DecodeLaunch plan = plan_decode_attention(p, kNumSms);

  std::vector<std::vector<double>> expected;
  std::vector<double> expected_lse;
  for (const test::Sequence& s : sequences) {
    for (int64_t i = 0; i < q_tokens * kHeads; ++i) {
      expected.emplace_back(static_cast<size_t>(dim));
      expected_lse.push_back(-INFINITY);
      if (s.kv_len > 0) s.reference(i / kHeads, i % kHeads, expected.back(), expected_lse.back());
    }
  }
  for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
    std::fill(out.values.begin(), out.values.end(), bf16(kNan));
    std::fill(lse.values.begin(), lse.values.end(), kNan);
    outcome.add(launch(dim, fp8, sm90, plan, seed));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double found = lse.values[i];
      if (found != expected_lse[i])
        test::meet(outcome.lse_error, std::abs(found - expected_lse[i]));
      for (size_t d = 0; d < expected[i].size(); ++d) {
        test::meet(outcome.error,
                   std::abs(float(out.values[i * expected[i].size() + d]) - expected[i][d]));
      }
    }
  }
}

int run_all(bool sm90, int64_t dim, bool fp8, uint64_t first_seed, uint64_t seeds) {
  const DecodeAttentionShape largest{.batch = kBatch,
                                     .q_tokens = 3,
                                     .q_heads = kHeads,
                                     .kv_heads = 1,
                                     .head_dim = dim,
                                     .max_tokens = kMaxPages * kPageSize,
                                     .dual_chunk = kChunks};
  Buffer<uint8_t> scratch(
      std::vector<uint8_t>(static_cast<size_t>(decode_attention_scratch_bytes(largest, kNumSms)),
                           uint8_t{0}),
      "scratch", true);
  Outcome outcome;
  for (const int64_t q_tokens : {1, 3}) {
    run(sm90, dim, fp8, q_tokens, first_seed, seeds, scratch, outcome);
  }
  if (std::any_of(scratch.values.begin(), scratch.values.begin() + kCounterBytes,
                  [](uint8_t byte) { return byte != 0; })) {
    std::printf("issue counter a counter was not reset\n");
  }
  std::printf("error %g %g\n", outcome.error, outcome.lse_error);
  return 0;
}

}  // namespace
}  // namespace qwen1m

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  try {
    return qwen1m::run_all(std::strcmp(argv[1], "sm90") == 0, std::atoi(argv[2]),
                           std::strstr(argv[2], "fp8") != nullptr,
                           std::strtoull(argv[3], nullptr, 10),
                           std::strtoull(argv[4], nullptr, 10));
  } catch (const qwen1m::Error& error) {  // a mutant may have broken what the host checks
    std::printf("issue refused %s\n", error.what());
    return 0;
  }
}
