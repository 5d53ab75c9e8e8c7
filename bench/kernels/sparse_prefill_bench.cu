// sparse_estimate, sparse_plan and sparse_prefill of the last segment of a prompt, without torch:
// time, TFLOP/s on the pairs that are attended to (4 D per pair), and the ratio to dense
// prefill_attention of the same rows in the same run. Pages lie in random order.
//
// The plan timed by sparse_prefill is made here: per head the nearest diagonals, `runs` runs of
// `run_len` more, evenly spread, and `verticals` columns in random places.
#include <set>

#include "bench.h"
#include "qwen1m/prefill_attention.h"
#include "qwen1m/sparse_estimate.h"
#include "qwen1m/sparse_plan.h"
#include "qwen1m/sparse_prefill.h"

namespace qwen1m::bench {
namespace {

struct Case {
  int64_t tokens;  // of the prompt; the segment is its last 32,768
  int64_t q_heads, kv_heads;
  int64_t verticals, runs, run_len;
  int64_t tile_tokens = 128;
};
constexpr int64_t kDim = 128, kSegment = 32768, kLocal = 1024, kLastRows = 64;

/// The lists of one head, in one stage: plain RoPE.
struct Lists {
  std::vector<int32_t> verticals, runs;  // runs: lo, hi, lo, hi, ...
};

Lists make_lists(const Case& c, unsigned seed) {
  std::mt19937 generator(seed);
  Lists lists;
  lists.runs = {0, static_cast<int32_t>(kLocal)};
  const int64_t apart = (c.tokens - kSegment - 2 * kLocal) / (c.runs + 1);
  for (int64_t i = 1; i <= c.runs; ++i) {
    const int64_t lo = kLocal + i * apart;
    lists.runs.insert(lists.runs.end(),
                      {static_cast<int32_t>(lo), static_cast<int32_t>(lo + c.run_len)});
  }
  std::set<int32_t> keys;
  std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(c.tokens - 1));
  while (static_cast<int64_t>(keys.size()) < c.verticals) keys.insert(any(generator));
  lists.verticals.assign(keys.begin(), keys.end());
  return lists;
}

/// Pairs of one head that are attended to.
double count_pairs(const Lists& lists, int64_t tokens, int64_t tile) {
  double pairs = 0;
  for (int64_t t0 = tokens - kSegment; t0 < tokens; t0 += tile) {
    int64_t before = 0;  // keys before the tile; in it every row sees what causality leaves
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (size_t i = 0; i < lists.runs.size(); i += 2) {
      const int64_t begin = std::max<int64_t>(0, t0 - lists.runs[i + 1] + 1);
      const int64_t end = std::min(t0, t0 + tile - lists.runs[i]);
      if (begin < end) ranges.emplace_back(begin, end);
    }
    for (const auto& [begin, end] : ranges) before += end - begin;
    for (const int64_t key : lists.verticals) {
      bool covered = key >= t0;
      for (const auto& [begin, end] : ranges) covered = covered || (key >= begin && key < end);
      before += covered ? 0 : 1;
    }
    pairs += static_cast<double>(before * tile) + static_cast<double>(tile * (tile + 1)) / 2;
  }
  return pairs;
}

void add(Report& report, const Case& c, const char* op, const Microseconds& us, const char* unit,
         double rate, double ratio) {
  char fields[320];
  std::snprintf(fields, sizeof(fields),
                "\"op\": \"%s\", \"tokens\": %lld, \"rows\": %lld, \"q_heads\": %lld, "
                "\"kv_heads\": %lld, \"verticals\": %lld, \"runs\": %lld, \"run_len\": %lld, "
                "\"tile_tokens\": %lld, \"dense_over_this\": %.3f",
                op, static_cast<long long>(c.tokens), static_cast<long long>(kSegment),
                static_cast<long long>(c.q_heads), static_cast<long long>(c.kv_heads),
                static_cast<long long>(c.verticals), static_cast<long long>(c.runs),
                static_cast<long long>(c.run_len), static_cast<long long>(c.tile_tokens), ratio);
  report.add(fields, us, unit, rate);
  std::printf(
      "%-16s | %8lld tokens, %lld/%lld heads, tiles of %lld | %11.1f us | %8.1f %s | dense / this "
      "%.2f\n",
      op, static_cast<long long>(c.tokens), static_cast<long long>(c.q_heads),
      static_cast<long long>(c.kv_heads), static_cast<long long>(c.tile_tokens), us.p50, rate, unit,
      ratio);
  std::fflush(stdout);
}

void measure(const Case& c, const Options& options, Report& report) {
  const int64_t num_pages = c.tokens / kPageSize, heads = c.q_heads;
  const Buffer<bf16> q(kSegment * heads * kDim), out(q.count());
  const Buffer<bf16> k(num_pages * c.kv_heads * kPageSize * kDim), v(k.count());
  fill_normal(q, 1);
  fill_normal(k, 2);
  fill_normal(v, 3);
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(4));
  const Buffer<int32_t> block_table(pages);
  std::vector<float> no_rotation(static_cast<size_t>(c.tokens * kDim));
  for (size_t i = 0; i < no_rotation.size(); i += 2) no_rotation[i] = 1;  // (cos, sin) = (1, 0)
  const Buffer<float> rope_table(no_rotation);
  const Buffer<float> logit_scale(std::vector<float>{0.088388348f});
  const Buffer<int64_t> cu_q(std::vector<int64_t>{0, kSegment}),
      kv_len(std::vector<int64_t>{c.tokens});

  const int64_t row = heads * kDim, page = kPageSize * kDim;
  const int64_t v_capacity = sparse_vertical_capacity(c.verticals, c.tokens);
  const int64_t r_capacity = c.runs + 1;
  std::vector<int32_t> verticals(static_cast<size_t>(heads * v_capacity)),
      runs(static_cast<size_t>(heads * kStages * r_capacity * 2)), vertical_count, run_count;
  double pairs = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const Lists lists = make_lists(c, static_cast<unsigned>(10 + h));
    std::copy(lists.verticals.begin(), lists.verticals.end(), verticals.begin() + h * v_capacity);
    std::copy(lists.runs.begin(), lists.runs.end(),
              runs.begin() + (h * kStages + 2) * r_capacity * 2);
    vertical_count.insert(vertical_count.end(), {0, 0, static_cast<int32_t>(c.verticals)});
    run_count.insert(run_count.end(), {0, 0, static_cast<int32_t>(r_capacity)});
    pairs += count_pairs(lists, c.tokens, c.tile_tokens);
  }
  const Buffer<int32_t> d_verticals(verticals), d_runs(runs), d_vertical_count(vertical_count),
      d_run_count(run_count);
  const Buffer<bf16> scratch(2 * heads * (v_capacity + 1) * kDim);

  SparsePrefillParams p;
  p.q = {q.data(), DType::kBFloat16, {kSegment, heads, kDim}, {row, kDim, 1}};
  p.out = p.q;
  p.out.data = out.data();
  p.k_cache = {k.data(),
               DType::kBFloat16,
               {num_pages, c.kv_heads, kPageSize, kDim},
               {c.kv_heads * page, page, kDim, 1}};
  p.v_cache = p.k_cache;
  p.v_cache.data = v.data();
  p.block_table = {block_table.data(), {1, num_pages}, {num_pages, 1}};
  p.logit_scale = {logit_scale.data(), {1}, {1}};
  p.rope_table = {rope_table.data(), {c.tokens, kDim / 2, 2}, {kDim, 2, 1}};
  p.verticals = {d_verticals.data(), {heads, v_capacity}, {v_capacity, 1}};
  p.vertical_count = {d_vertical_count.data(), {heads, kStages}, {kStages, 1}};
  p.runs = {d_runs.data(),
            {heads, kStages, r_capacity, 2},
            {kStages * r_capacity * 2, r_capacity * 2, 2, 1}};
  p.run_count = {d_run_count.data(), {heads, kStages}, {kStages, 1}};
  const int64_t head_scratch = (v_capacity + 1) * kDim;
  p.scratch = {scratch.data(),
               DType::kBFloat16,
               {2, heads, v_capacity + 1, kDim},
               {heads * head_scratch, head_scratch, kDim, 1}};
  p.q_begin = p.segment_begin = c.tokens - kSegment;
  p.segment_end = c.tokens;
  p.tile_tokens = c.tile_tokens;

  PrefillAttentionParams dense;
  dense.q = p.q;
  dense.out = p.out;
  dense.k_cache = p.k_cache;
  dense.v_cache = p.v_cache;
  dense.block_table = p.block_table;
  dense.cu_q = {cu_q.data(), {2}, {1}};
  dense.kv_len = {kv_len.data(), {1}, {1}};
  dense.logit_scale = p.logit_scale;
  dense.rope_table = p.rope_table;

  const auto flops = [&](double n) { return 4.0 * static_cast<double>(kDim) * n; };
  const auto rows = static_cast<double>(kSegment), all = static_cast<double>(c.tokens);
  const double dense_pairs =
      static_cast<double>(heads) * (rows * (all - rows) + rows * (rows + 1) / 2);
  const Microseconds dense_us =
      time_cold([&](cudaStream_t stream) { prefill_attention_cuda(dense, stream); },
                3);  // up to a second each
  add(report, c, "prefill_attention", dense_us, "tflops", flops(dense_pairs) / dense_us.p50 * 1e-6,
      1);
  const Microseconds sparse_us =
      time_cold([&](cudaStream_t stream) { sparse_prefill_cuda(p, stream); }, options.runs);
  add(report, c, "sparse_prefill", sparse_us, "tflops", flops(pairs) / sparse_us.p50 * 1e-6,
      dense_us.p50 / sparse_us.p50);

  const Buffer<float> vertical(heads * c.tokens), slash(heads * c.tokens);
  SparseEstimateParams e;
  e.vertical = {vertical.data(), {heads, c.tokens}, {c.tokens, 1}};
  e.slash = {slash.data(), {heads, c.tokens}, {c.tokens, 1}};
  e.q = p.q;
  e.q.sizes[0] = kLastRows;
  e.q.data = q.data() + (kSegment - kLastRows) * row;
  e.k_cache = p.k_cache;
  e.block_table = p.block_table;
  e.logit_scale = p.logit_scale;
  e.rope_table = p.rope_table;
  e.segment_end = c.tokens;
  e.critical = false;
  const Microseconds estimate_us =
      time_cold([&](cudaStream_t stream) { sparse_estimate_cuda(e, stream); }, options.runs);
  const double products = 2 * 2.0 * static_cast<double>(kDim * heads * kLastRows) * all;
  add(report, c, "sparse_estimate", estimate_us, "tflops", products / estimate_us.p50 * 1e-6,
      dense_us.p50 / estimate_us.p50);

  const int64_t s_size = kLocal + c.runs * c.run_len;
  const Buffer<int64_t> v_size(std::vector<int64_t>(static_cast<size_t>(heads), c.verticals));
  const Buffer<int64_t> s_sizes(std::vector<int64_t>(static_cast<size_t>(heads), s_size));
  const int64_t capacity = sparse_run_capacity(s_size, c.tokens, c.tile_tokens, false);
  const Buffer<int32_t> planned(heads * kStages * capacity * 2);
  SparsePlanParams s;
  s.verticals = {d_verticals.data(), {heads, v_capacity}, {v_capacity, 1}};
  s.vertical_count = {d_vertical_count.data(), {heads, kStages}, {kStages, 1}};
  s.runs = {
      planned.data(), {heads, kStages, capacity, 2}, {kStages * capacity * 2, capacity * 2, 2, 1}};
  s.run_count = {d_run_count.data(), {heads, kStages}, {kStages, 1}};
  s.vertical_score = {vertical.data(), {heads, c.tokens}, {c.tokens, 1}};
  s.slash_score = {slash.data(), {heads, c.tokens}, {c.tokens, 1}};
  s.v_size = {v_size.data(), {heads}, {1}};
  s.s_size = {s_sizes.data(), {heads}, {1}};
  s.segment_begin = p.segment_begin;
  s.tile_tokens = c.tile_tokens;
  const Microseconds plan_us =
      time_cold([&](cudaStream_t stream) { sparse_plan_cuda(s, stream); }, options.runs);
  const double bytes = 2.0 * 4 * static_cast<double>(heads) * all * 9;  // nine reads of each score
  add(report, c, "sparse_plan", plan_us, "gb_per_s", bytes / plan_us.p50 * 1e-3,
      dense_us.p50 / plan_us.p50);
}

}  // namespace
}  // namespace qwen1m::bench

int main(int argc, char** argv) {
  using namespace qwen1m;
  return bench::run(argc, argv, [](const bench::Options& options, bench::Report& report) {
    // Budgets of (1000, 6096), in few long runs and in many short ones, each in tiles of 128 and of
    // 256 rows; and published large ones.
    for (const int64_t tokens : {131072, 262144, 524288, 1048576}) {
      for (const int64_t tile : {128, 256}) {
        bench::measure({tokens, 28, 4, 1000, 20, 254, tile}, options, report);
        bench::measure({tokens, 28, 4, 1000, 158, 32, tile}, options, report);
      }
    }
    bench::measure({1048576, 28, 4, 3920, 80, 83}, options, report);
    bench::measure({131072, 40, 8, 1000, 20, 254}, options, report);
  });
}
