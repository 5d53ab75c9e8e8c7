// prefill_attention alone, without torch: time and TFLOP/s, counted as 4 D per visible (query, key)
// pair and head. Pages lie in random order.
#include "bench.h"
#include "qwen1m/prefill_attention.h"

namespace qwen1m::bench {
namespace {

struct Case {
  int64_t tokens;
  int64_t q_heads, kv_heads, head_dim;
  int64_t chunk_size, local_size;  // of Dual Chunk Attention
};

/// The visible pairs of one head.
double pairs(int64_t tokens) {
  const auto n = static_cast<double>(tokens);
  return n * (n + 1) / 2;
}

void measure(const Case& c, const Options& options, Report& report) {
  const int64_t num_pages = (c.tokens + kPageSize - 1) / kPageSize;
  const DualChunk chunks{c.chunk_size, c.local_size};
  const int64_t table_rows = chunks.table_rows(c.tokens);
  const Buffer<bf16> q(c.tokens * c.q_heads * c.head_dim), out(q.count());
  const Buffer<bf16> k(num_pages * c.kv_heads * kPageSize * c.head_dim), v(k.count());
  fill_normal(q, 1);
  fill_normal(k, 2);
  fill_normal(v, 3);
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(4));
  std::vector<float> no_rotation(static_cast<size_t>(table_rows * c.head_dim));
  for (size_t i = 0; i < no_rotation.size(); i += 2) no_rotation[i] = 1;  // (cos, sin) = (1, 0)
  const Buffer<int32_t> block_table(pages);
  const Buffer<float> rope_table(no_rotation);
  const Buffer<int64_t> cu_q(std::vector<int64_t>{0, c.tokens});
  const Buffer<int64_t> kv_len(std::vector<int64_t>{c.tokens});
  const Buffer<float> logit_scale(std::vector<float>{c.head_dim == 64 ? 0.125f : 0.088388348f});

  const int64_t row = c.q_heads * c.head_dim, page = kPageSize * c.head_dim;
  PrefillAttentionParams p;
  p.q = {q.data(), DType::kBFloat16, {c.tokens, c.q_heads, c.head_dim}, {row, c.head_dim, 1}};
  p.out = p.q;
  p.out.data = out.data();
  p.k_cache = {k.data(),
               DType::kBFloat16,
               {num_pages, c.kv_heads, kPageSize, c.head_dim},
               {c.kv_heads * page, page, c.head_dim, 1}};
  p.v_cache = p.k_cache;
  p.v_cache.data = v.data();
  p.block_table = {block_table.data(), {1, num_pages}, {num_pages, 1}};
  p.cu_q = {cu_q.data(), {2}, {1}};
  p.kv_len = {kv_len.data(), {1}, {1}};
  p.logit_scale = {logit_scale.data(), {1}, {1}};
  p.rope_table = {rope_table.data(), {table_rows, c.head_dim / 2, 2}, {c.head_dim, 2, 1}};
  p.dual_chunk = chunks;

  const Microseconds us =
      time_cold([&](cudaStream_t stream) { prefill_attention_cuda(p, stream); }, options.runs);
  const double flops = 4.0 * static_cast<double>(c.head_dim * c.q_heads) * pairs(c.tokens);
  const double tflops = flops / us.p50 * 1e-6;
  char fields[256];
  std::snprintf(fields, sizeof(fields),
                "\"op\": \"prefill_attention\", \"tokens\": %lld, \"q_heads\": %lld, "
                "\"kv_heads\": %lld, \"head_dim\": %lld, \"chunk_len\": %lld",
                static_cast<long long>(c.tokens), static_cast<long long>(c.q_heads),
                static_cast<long long>(c.kv_heads), static_cast<long long>(c.head_dim),
                static_cast<long long>(chunks.chunk_len()));
  report.add(fields, us, "tflops", tflops);
  std::printf(
      "prefill_attention | %7lld tokens, %lld/%lld x %lld%s | %10.1f us (%.1f to %.1f) "
      "| %6.1f TFLOP/s",
      static_cast<long long>(c.tokens), static_cast<long long>(c.q_heads),
      static_cast<long long>(c.kv_heads), static_cast<long long>(c.head_dim),
      c.chunk_size == kInfiniteChunk ? "" : ", DCA", us.p50, us.p10, us.p90, tflops);
  if (options.ceiling_tflops > 0) {
    std::printf(" | %.1f %% of the ceiling", 100 * tflops / options.ceiling_tflops);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace
}  // namespace qwen1m::bench

int main(int argc, char** argv) {
  using namespace qwen1m;
  return bench::run(argc, argv, [](const bench::Options& options, bench::Report& report) {
    std::vector<bench::Case> cases;
    for (const int64_t tokens : {4096, 8192, 16384, 32768, 65536, 131072}) {
      cases.push_back({tokens, 28, 4, 128, kInfiniteChunk, 0});
      cases.push_back({tokens, 40, 8, 128, kInfiniteChunk, 0});
    }
    cases.push_back({131072, 28, 4, 128, 40960, 8192});  // chunks of 32,768: all three ranges
    cases.push_back({32768, 14, 2, 64, kInfiniteChunk, 0});
    for (const bench::Case& c : cases) bench::measure(c, options, report);
  });
}
