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
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "arch/emu/emulator.h"
#include "inputs.h"
#include "ops/prefill_attention/prefill_attention_launch.h"
#include "qwen1m/error.h"

namespace qwen1m {
namespace {

// chunk_len 208: borders at 208, 416 and 624; the last page is [512, 633), with a border inside.
constexpr int64_t kHeads = 2, kKvLen = 633, kRows = 280;
constexpr DualChunk kChunks{.chunk_size = 250, .local_size = 42};
const float kNan = std::numeric_limits<float>::quiet_NaN();

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

struct Inputs {
  int64_t dim;
  float logit_scale;
  std::vector<bf16> q, k, v;  // [row, head, dim], [key, dim]
  std::vector<float> table;   // [position, dim / 2, 2]

  explicit Inputs(int64_t head_dim)
      : dim(head_dim),
        logit_scale(3.0f / std::sqrt(static_cast<float>(head_dim))),
        q(test::random_values<bf16>(kRows * kHeads * dim, 1, 1.7f)),
        k(test::random_values<bf16>(kKvLen * dim, 2, 1.7f)),
        v(test::random_values<bf16>(kKvLen * dim, 3, 1.7f)) {
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
};

/// The definition, float64. Keys are taken as they lie in the cache.
void reference(const Inputs& in, int64_t row, int64_t head, std::vector<double>& out, double& lse) {
  const int64_t token = kKvLen - kRows + row, half = in.dim / 2;
  std::vector<double> logits;
  for (int64_t j = 0; j <= token; ++j) {
    const int64_t distance = kChunks.chunk(token) - kChunks.chunk(j);
    const int64_t position = distance == 0   ? kChunks.intra_position(token)
                             : distance == 1 ? kChunks.successive_position(token)
                                             : kChunks.inter_position();
    const float* cs = in.table.data() + position * in.dim;
    const bf16* q = in.q.data() + (row * kHeads + head) * in.dim;
    const bf16* k = in.k.data() + j * in.dim;
    double sum = 0;
    for (int64_t i = 0; i < half; ++i) {
      const double c = cs[2 * i], s = cs[2 * i + 1];
      const double x = float(q[i]), y = float(q[i + half]);
      sum += (x * c - y * s) * float(k[i]) + (y * c + x * s) * float(k[i + half]);
    }
    logits.push_back(sum * in.logit_scale);
  }
  const double m = *std::max_element(logits.begin(), logits.end());
  double l = 0;
  std::fill(out.begin(), out.end(), 0.0);
  for (int64_t j = 0; j <= token; ++j) {
    const double p = std::exp(logits[static_cast<size_t>(j)] - m);
    l += p;
    for (int64_t d = 0; d < in.dim; ++d) {
      out[static_cast<size_t>(d)] += p * float(in.v[static_cast<size_t>(j * in.dim + d)]);
    }
  }
  for (double& x : out) x /= l;
  lse = m + std::log(l);
}

std::vector<bf16> pages(const std::vector<bf16>& rows, const std::vector<int32_t>& table,
                        int64_t num_pages, int64_t dim) {
  std::vector<bf16> cache(static_cast<size_t>(num_pages * kPageSize * dim), bf16(kNan));
  for (int64_t j = 0; j < kKvLen; ++j) {
    const int64_t page = table[static_cast<size_t>(j / kPageSize)];
    std::copy_n(rows.data() + j * dim, dim,
                cache.data() + (page * kPageSize + j % kPageSize) * dim);
  }
  return cache;
}

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
  const Inputs in(dim);
  const std::vector<int32_t> page_of{3, 0, 5, 1, 6, -1};
  constexpr int64_t kNumPages = 7;
  Buffer<bf16> q(in.q, "q"), k(pages(in.k, page_of, kNumPages, dim), "k_cache"),
      v(pages(in.v, page_of, kNumPages, dim), "v_cache");
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
      reference(in, row, head, expected.back(), expected_lse.back());
    }
  }
  double worst = 0, worst_lse = 0;
  const auto meet = [](double& largest, double error) {  // a NaN stays
    if (!(error <= largest)) largest = error;
  };
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
      meet(worst_lse, std::abs(lse.values[i] - expected_lse[i]));
      for (size_t d = 0; d < expected[i].size(); ++d) {
        meet(worst, std::abs(float(out.values[i * expected[i].size() + d]) - expected[i][d]));
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
