// Runs an emulated prefill_attention kernel on one hard case and compares it with the definition in
// float64. test_mutants.py compiles this file again for each broken kernel.
//
//   prefill_driver <sm80|sm90> <head_dim> <first seed> <seeds>
//
// -DDRIVER_SM90=0|1 and -DDRIVER_DIM=64|128 leave out the other kernels: it compiles faster.
//
// The case: Dual Chunk borders inside tiles and pages, a tile and a page that are not full, two
// query heads of a KV head, NaN wherever nothing may be read. Output, one line each:
//   issue <kind> <message>    what the emulator reported, of all seeds
//   error <out> <lse>         largest errors of all seeds; nan if a value is missing
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "attention_case.h"
#include "ops/prefill_attention/prefill_attention_launch.h"
#include "qwen1m/error.h"

namespace qwen1m {
namespace {

using test::Buffer;
using test::kChunks;
using test::kNan;

// Borders at 208, 416 and 624; the last page is [512, 633), with a border inside.
constexpr int64_t kHeads = 2, kKvLen = 633, kRows = 280;

template <typename Kernel>
arch::emu::Report launch(const PrefillAttentionParams& p, const typename Kernel::Params& params,
                         uint64_t seed) {
  return arch::emu::launch({.blocks = max_tiles(p),
                            .threads = Kernel::kThreads,
                            .shared_bytes = sizeof(typename Kernel::Smem)},
                           [&] { Kernel::run(params); }, {.seed = seed});
}

#ifdef DRIVER_SM90
constexpr int kOnlySm90 = DRIVER_SM90, kOnlyDim = DRIVER_DIM;
#else
constexpr int kOnlySm90 = -1, kOnlyDim = -1;
#endif

template <int kHeadDim>
arch::emu::Report launch(bool sm90, const PrefillAttentionParams& p, uint64_t seed) {
  if constexpr (kOnlyDim < 0 || kOnlyDim == kHeadDim) {
    if constexpr (kOnlySm90 != 1) {
      if (!sm90) return launch<PrefillAttentionSm80<kHeadDim>>(p, {p}, seed);
    }
    if constexpr (kOnlySm90 != 0) {
      if (sm90) {
        return launch<PrefillAttentionSm90<kHeadDim>>(
            p,
            {p, arch::emu::make_tensor_map(page_map(p.k_cache)),
             arch::emu::make_tensor_map(page_map(p.v_cache))},
            seed);
      }
    }
  }
  throw Error("this driver was compiled without that kernel");
}

int run(bool sm90, int64_t dim, uint64_t first_seed, uint64_t seeds) {
  const test::Sequence in(kKvLen, kRows, kHeads, dim, 1);
  const std::vector<int32_t> page_of{3, 0, 5, 1, 6, -1};
  constexpr int64_t kNumPages = 7;
  const std::vector<bf16> poisoned(static_cast<size_t>(kNumPages * kPageSize * dim), bf16(kNan));
  Buffer<bf16> q(in.q, "q"), k(poisoned, "k_cache"), v(poisoned, "v_cache");
  in.put(in.k, page_of, k.values);
  in.put(in.v, page_of, v.values);
  Buffer<int32_t> block_table(page_of, "block_table");
  Buffer<int64_t> cu_q({0, kRows}, "cu_q"), kv_len({kKvLen}, "kv_len");
  Buffer<float> scale({in.logit_scale}, "logit_scale"), table(in.table, "rope_table");
  Buffer<bf16> out(std::vector<bf16>(in.q.size(), bf16(kNan)), "out", true);
  Buffer<float> lse(std::vector<float>(kRows * kHeads, kNan), "lse", true);
  PrefillAttentionParams p{
      .out = test::view(out.values, {kRows, kHeads, dim}),
      .lse = {lse.values.data(), {kRows, kHeads}, {kHeads, 1}},
      .q = test::view(q.values, {kRows, kHeads, dim}),
      .k_cache = test::view(k.values, {kNumPages, 1, kPageSize, dim}),
      .v_cache = test::view(v.values, {kNumPages, 1, kPageSize, dim}),
      .block_table = {block_table.values.data(), {1, 6}, {6, 1}},
      .cu_q = {cu_q.values.data(), {2}, {1}},
      .kv_len = {kv_len.values.data(), {1}, {1}},
      .logit_scale = {scale.values.data(), {1}, {1}},
      .rope_table = {table.values.data(), {kChunks.chunk_size + 1, dim / 2, 2}, {dim, 2, 1}},
      .dual_chunk = kChunks};
  check_prefill_attention_gpu(p);

  std::vector<std::vector<double>> expected;
  std::vector<double> expected_lse;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t head = 0; head < kHeads; ++head) {
      expected.emplace_back(static_cast<size_t>(dim));
      expected_lse.emplace_back();
      in.reference(row, head, expected.back(), expected_lse.back());
    }
  }
  double worst = 0, worst_lse = 0;
  std::set<std::string> seen;
  for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
    std::fill(out.values.begin(), out.values.end(), bf16(kNan));
    std::fill(lse.values.begin(), lse.values.end(), kNan);
    const arch::emu::Report report =
        dim == 128 ? launch<128>(sm90, p, seed) : launch<64>(sm90, p, seed);
    if (!report.completed) worst = kNan;
    for (const auto& issue : report.issues) {
      if (seen.insert(issue.message).second) {
        std::printf("issue %s %s\n", issue.kind.c_str(), issue.message.c_str());
      }
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      test::meet(worst_lse, std::abs(lse.values[i] - expected_lse[i]));
      for (size_t d = 0; d < expected[i].size(); ++d) {
        test::meet(worst, std::abs(float(out.values[i * expected[i].size() + d]) - expected[i][d]));
      }
    }
  }
  std::printf("error %g %g\n", worst, worst_lse);
  return 0;
}

}  // namespace
}  // namespace qwen1m

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  try {
    return qwen1m::run(std::strcmp(argv[1], "sm90") == 0, std::atoi(argv[2]),
                       std::strtoull(argv[3], nullptr, 10), std::strtoull(argv[4], nullptr, 10));
  } catch (const qwen1m::Error& error) {  // a mutant may have broken what the host checks
    std::printf("issue refused %s\n", error.what());
    return 0;
  }
}
