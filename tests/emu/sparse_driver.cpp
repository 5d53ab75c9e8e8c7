// Runs the emulated sparse_prefill kernels on one hard case and compares them with the definition
// (sparse_prefill.h) in float64. test_mutants.py compiles this file again for each broken kernel.
//
//   sparse_driver <sm80|sm90> <head_dim> <first seed> <seeds>
//
// -DDRIVER_SM90=0|1 and -DDRIVER_DIM=64|128 leave out the other kernels: it compiles faster.
//
// The case: a segment with keys in all three stages and borders inside pages; rows that begin and
// end inside tiles, NaN and no page behind them; tile_tokens 64, 128 and 256. Head 1 has more
// verticals than a piece, some of them in runs, some behind the rows; head 0 has rows without any
// key; head 2 is dense. Output, one line each:
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
#include "ops/sparse_prefill/sparse_prefill_launch.h"
#include "qwen1m/error.h"

namespace qwen1m {
namespace {

using test::Buffer;
using test::kChunks;
using test::kNan;

constexpr int64_t kHeads = 3, kSegmentBegin = 416, kSegmentEnd = 624;
constexpr int64_t kQBegin = 430;
constexpr int64_t kBorders[kStages + 1] = {0, 208, 416, 624};  // chunk_len 208

struct Run {
  int32_t lo, hi;
};

/// The lists of a head, by stage.
struct Lists {
  std::vector<int32_t> verticals[kStages];
  std::vector<Run> runs[kStages];
};

/// Every run in every stage; those less than tile_tokens apart become one.
std::vector<Run> merged(const std::vector<Run>& runs, int64_t tile_tokens) {
  std::vector<Run> result;
  for (const Run& run : runs) {
    if (!result.empty() && run.lo - result.back().hi < tile_tokens) {
      result.back().hi = run.hi;
    } else {
      result.push_back(run);
    }
  }
  return result;
}

std::vector<Lists> lists(int64_t tile_tokens) {
  std::vector<Lists> heads(kHeads);
  for (int32_t key = 0; key < 208; key += 2) heads[1].verticals[0].push_back(key + key % 3);
  heads[1].verticals[0].erase(
      std::unique(heads[1].verticals[0].begin(), heads[1].verticals[0].end()),
      heads[1].verticals[0].end());
  heads[1].verticals[1] = {208, 250, 333, 414, 415};
  heads[1].verticals[2] = {416, 431, 500, 527, 543, 544, 609, 610, 623};
  for (int stage = 0; stage < kStages; ++stage) {
    heads[1].runs[stage] =
        merged({{0, 3}, {70, 71}, {215, 218}, {390, 420}, {600, 624}}, tile_tokens);
    heads[2].runs[stage] = {{0, kSegmentEnd}};
  }
  heads[0].runs[2] = {{150, 160}};
  return heads;
}

/// The keys of row `token`, from the definition.
bool attends(const Lists& head, int64_t tile_tokens, int64_t token, int64_t key) {
  const int64_t t0 = kSegmentBegin + (token - kSegmentBegin) / tile_tokens * tile_tokens;
  const int64_t t1 = std::min(t0 + tile_tokens, kSegmentEnd);
  for (int stage = 0; stage < kStages; ++stage) {
    for (const int32_t vertical : head.verticals[stage]) {
      if (vertical == key) return true;
    }
    for (const Run& run : head.runs[stage]) {
      if (key >= std::max(kBorders[stage], t0 - run.hi + 1) &&
          key < std::min(kBorders[stage + 1], t1 - run.lo)) {
        return true;
      }
    }
  }
  return false;
}

template <typename Kernel>
arch::emu::Report launch(const typename Kernel::Params& params, uint64_t seed) {
  return arch::emu::launch({.blocks = Kernel::num_blocks(params.args),
                            .threads = Kernel::kThreads,
                            .cluster_size = Kernel::kCluster,
                            .shared_bytes = sizeof(typename Kernel::Smem)},
                           [&] { Kernel::run(params); }, {.seed = seed});
}

#ifdef DRIVER_SM90
constexpr int kOnlySm90 = DRIVER_SM90, kOnlyDim = DRIVER_DIM;
#else
constexpr int kOnlySm90 = -1, kOnlyDim = -1;
#endif

template <int kHeadDim>
arch::emu::Report launch(bool sm90, const SparsePrefillParams& p, uint64_t seed) {
  if constexpr (kOnlyDim < 0 || kOnlyDim == kHeadDim) {
    if constexpr (kOnlySm90 != 1) {
      if (!sm90) return launch<SparsePrefillSm80<kHeadDim>>({p}, seed);
    }
    if constexpr (kOnlySm90 != 0) {
      if (sm90) {
        const arch::TensorMap k = arch::emu::make_tensor_map(half_page_map(p.k_cache));
        const arch::TensorMap v = arch::emu::make_tensor_map(half_page_map(p.v_cache));
        const arch::TensorMap verticals = arch::emu::make_tensor_map(vertical_map(p));
        if (p.tile_tokens == 256) {
          return launch<SparsePrefillSm90<kHeadDim, 2>>({p, k, v, verticals}, seed);
        }
        return launch<SparsePrefillSm90<kHeadDim>>({p, k, v, verticals}, seed);
      }
    }
  }
  throw Error("this driver was compiled without that kernel");
}

struct Errors {
  double out = 0, lse = 0;
  std::set<std::string> seen;

  void add(const arch::emu::Report& report) {
    if (!report.completed) out = kNan;
    for (const auto& issue : report.issues) {
      if (seen.insert(issue.message).second) {
        std::printf("issue %s %s\n", issue.kind.c_str(), issue.message.c_str());
      }
    }
  }
};

void run(bool sm90, int64_t dim, int64_t tile_tokens, int64_t q_end, uint64_t first_seed,
         uint64_t seeds, Errors& errors) {
  const int64_t rows = q_end - kQBegin;
  const test::Sequence in(q_end, rows, kHeads, dim, 1);
  std::vector<int32_t> page_of{3, 0, 5, 1, 6, -1};
  if (q_end <= 4 * kPageSize) page_of[4] = -1;
  constexpr int64_t kNumPages = 7;
  const std::vector<bf16> poisoned(static_cast<size_t>(kNumPages * kPageSize * dim), bf16(kNan));
  Buffer<bf16> q(in.q, "q"), k(poisoned, "k_cache"), v(poisoned, "v_cache");
  in.put(in.k, page_of, k.values);
  in.put(in.v, page_of, v.values);

  const std::vector<Lists> heads = lists(tile_tokens);
  const int64_t capacity = 130, run_capacity = 7;
  Buffer<int32_t> verticals(std::vector<int32_t>(kHeads * capacity, 1 << 30), "verticals");
  Buffer<int32_t> vertical_count(std::vector<int32_t>(kHeads * kStages), "vertical_count");
  Buffer<int32_t> runs(std::vector<int32_t>(kHeads * kStages * run_capacity * 2, -1), "runs");
  Buffer<int32_t> run_count(std::vector<int32_t>(kHeads * kStages), "run_count");
  for (size_t head = 0; head < kHeads; ++head) {
    auto to = verticals.values.begin() + static_cast<int64_t>(head) * capacity;
    for (size_t stage = 0; stage < kStages; ++stage) {
      const auto& list = heads[head].verticals[stage];
      to = std::copy(list.begin(), list.end(), to);
      vertical_count.values[head * kStages + stage] = static_cast<int32_t>(list.size());
      const auto& pairs = heads[head].runs[stage];
      for (size_t i = 0; i < pairs.size(); ++i) {
        int32_t* at = runs.values.data() + ((head * kStages + stage) * run_capacity + i) * 2;
        at[0] = pairs[i].lo;
        at[1] = pairs[i].hi;
      }
      run_count.values[head * kStages + stage] = static_cast<int32_t>(pairs.size());
    }
  }
  Buffer<bf16> scratch(
      std::vector<bf16>(static_cast<size_t>(2 * kHeads * (capacity + 1) * dim), bf16(kNan)),
      "scratch", true);
  Buffer<int32_t> block_table(page_of, "block_table");
  Buffer<float> scale({in.logit_scale}, "logit_scale"), table(in.table, "rope_table");
  Buffer<bf16> out(std::vector<bf16>(in.q.size(), bf16(kNan)), "out", true);
  Buffer<float> lse(std::vector<float>(rows * kHeads, kNan), "lse", true);
  const SparsePrefillParams p{
      .out = test::view(out.values, {rows, kHeads, dim}),
      .lse = {lse.values.data(), {rows, kHeads}, {kHeads, 1}},
      .q = test::view(q.values, {rows, kHeads, dim}),
      .k_cache = test::view(k.values, {kNumPages, 1, kPageSize, dim}),
      .v_cache = test::view(v.values, {kNumPages, 1, kPageSize, dim}),
      .block_table = {block_table.values.data(), {1, 6}, {6, 1}},
      .logit_scale = {scale.values.data(), {1}, {1}},
      .rope_table = {table.values.data(), {kChunks.chunk_size + 1, dim / 2, 2}, {dim, 2, 1}},
      .verticals = {verticals.values.data(), {kHeads, capacity}, {capacity, 1}},
      .vertical_count = {vertical_count.values.data(), {kHeads, kStages}, {kStages, 1}},
      .runs = {runs.values.data(),
               {kHeads, kStages, run_capacity, 2},
               {kStages * run_capacity * 2, run_capacity * 2, 2, 1}},
      .run_count = {run_count.values.data(), {kHeads, kStages}, {kStages, 1}},
      .scratch = test::view(scratch.values, {2, kHeads, capacity + 1, dim}),
      .q_begin = kQBegin,
      .segment_begin = kSegmentBegin,
      .segment_end = kSegmentEnd,
      .dual_chunk = kChunks,
      .tile_tokens = tile_tokens};
  check_sparse_prefill_gpu(p);

  std::vector<double> expected(static_cast<size_t>(dim));
  double expected_lse = 0;
  std::vector<std::vector<double>> all;
  std::vector<double> all_lse;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < kHeads; ++head) {
      in.reference(row, head, expected, expected_lse, [&](int64_t key) {
        return attends(heads[static_cast<size_t>(head)], tile_tokens, kQBegin + row, key);
      });
      all.push_back(expected);
      all_lse.push_back(expected_lse);
    }
  }
  for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
    std::fill(out.values.begin(), out.values.end(), bf16(kNan));
    std::fill(lse.values.begin(), lse.values.end(), kNan);
    std::fill(scratch.values.begin(), scratch.values.end(), bf16(kNan));
    errors.add(launch<SparseGather>({p}, seed));
    errors.add(dim == 128 ? launch<128>(sm90, p, seed) : launch<64>(sm90, p, seed));
    for (size_t i = 0; i < all.size(); ++i) {
      test::meet(errors.lse,
                 lse.values[i] == all_lse[i] ? 0 : std::abs(lse.values[i] - all_lse[i]));
      for (size_t d = 0; d < all[i].size(); ++d) {
        test::meet(errors.out, std::abs(float(out.values[i * all[i].size() + d]) - all[i][d]));
      }
    }
  }
}

}  // namespace
}  // namespace qwen1m

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  try {
    qwen1m::Errors errors;
    const bool sm90 = std::strcmp(argv[1], "sm90") == 0;
    const int dim = std::atoi(argv[2]);
    const uint64_t first_seed = std::strtoull(argv[3], nullptr, 10);
    const uint64_t seeds = std::strtoull(argv[4], nullptr, 10);
    for (const int64_t tile_tokens : {64, 128, 256}) {
      qwen1m::run(sm90, dim, tile_tokens, 610, first_seed, seeds, errors);
    }
    // The second block of a cluster has no row of these; later pages are not there.
    if (sm90) qwen1m::run(sm90, dim, 256, 500, first_seed, seeds, errors);
    std::printf("error %g %g\n", errors.out, errors.lse);
  } catch (const qwen1m::Error& error) {  // a mutant may have broken what the host checks
    std::printf("issue refused %s\n", error.what());
  }
}
