// decode_attention alone, without torch: time and GB/s of keys and values read, and their share of
// a device copy measured in the same run. bf16 and fp8 caches; pages lie in random order. The
// scratch is given, as the engine does.
#include "bench.h"
#include "qwen1m/decode_attention.h"

namespace qwen1m::bench {
namespace {

/// Random codes of e4m3 of up to 30, two to an element: nothing overflows, and none is NaN.
void fill_codes(const Buffer<bf16>& buffer, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<uint32_t> block(256 * 1024);
  for (uint32_t& four : block) {
    four = static_cast<uint32_t>(generator()) & 0xdfdfdfdfu;  // exponents 0 to 3 and 8 to 11
  }
  const auto block_bytes = static_cast<int64_t>(block.size() * sizeof(uint32_t));
  for (int64_t done = 0; done < buffer.bytes(); done += block_bytes) {
    const int64_t bytes = std::min(block_bytes, buffer.bytes() - done);
    Q1M_CUDA_CHECK(cudaMemcpy(reinterpret_cast<char*>(buffer.data()) + done, block.data(),
                              static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
  }
}

struct Case {
  int64_t batch, tokens, q_tokens;  // tokens of each sequence
  int64_t q_heads, kv_heads, head_dim;
  int64_t chunk_size, local_size;  // of Dual Chunk Attention
  bool fp8 = false;
};

/// copy: GB/s.
void measure(const Case& c, const Options& options, double copy, Report& report) {
  const int64_t pages_each = (c.tokens + kPageSize - 1) / kPageSize;
  const int64_t num_pages = c.batch * pages_each, page = kPageSize * c.head_dim;
  const DualChunk chunks{c.chunk_size, c.local_size};
  const int64_t table_rows = chunks.table_rows(c.tokens);
  const Buffer<bf16> q(c.batch * c.q_tokens * c.q_heads * c.head_dim), out(q.count());
  // Of fp8 two codes to an element.
  const Buffer<bf16> k(num_pages * c.kv_heads * page / (c.fp8 ? 2 : 1)), v(k.count());
  const Buffer<float> cache_scale(std::vector<float>(static_cast<size_t>(c.kv_heads), 0.03125f));
  fill_normal(q, 1);
  if (c.fp8) {
    fill_codes(k, 2);
    fill_codes(v, 3);
  } else {
    fill_normal(k, 2);
    fill_normal(v, 3);
  }
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(4));
  std::vector<float> no_rotation(static_cast<size_t>(table_rows * c.head_dim));
  for (size_t i = 0; i < no_rotation.size(); i += 2) no_rotation[i] = 1;  // (cos, sin) = (1, 0)
  const Buffer<int32_t> block_table(pages);
  const Buffer<float> rope_table(no_rotation);
  const Buffer<int64_t> kv_len(std::vector<int64_t>(static_cast<size_t>(c.batch), c.tokens));
  const Buffer<float> logit_scale(std::vector<float>(static_cast<size_t>(c.batch * c.q_tokens),
                                                     c.head_dim == 64 ? 0.125f : 0.088388348f));
  const int64_t scratch_bytes =
      decode_attention_scratch_bytes({.batch = c.batch,
                                      .q_tokens = c.q_tokens,
                                      .q_heads = c.q_heads,
                                      .kv_heads = c.kv_heads,
                                      .head_dim = c.head_dim,
                                      .max_tokens = pages_each * kPageSize,
                                      .dual_chunk = chunks},
                                     arch::device_facts().num_sms);
  const Buffer<uint8_t> scratch(std::vector<uint8_t>(static_cast<size_t>(scratch_bytes), 0));

  const int64_t row = c.q_heads * c.head_dim;
  DecodeAttentionParams p;
  p.q = {q.data(),
         DType::kBFloat16,
         {c.batch, c.q_tokens, c.q_heads, c.head_dim},
         {c.q_tokens * row, row, c.head_dim, 1}};
  p.out = p.q;
  p.out.data = out.data();
  p.k_cache = {k.data(),
               c.fp8 ? DType::kFloat8E4M3 : DType::kBFloat16,
               {num_pages, c.kv_heads, kPageSize, c.head_dim},
               {c.kv_heads * page, page, c.head_dim, 1}};
  p.v_cache = p.k_cache;
  p.v_cache.data = v.data();
  p.block_table = {block_table.data(), {c.batch, pages_each}, {pages_each, 1}};
  p.kv_len = {kv_len.data(), {c.batch}, {1}};
  p.logit_scale = {logit_scale.data(), {c.batch, c.q_tokens}, {c.q_tokens, 1}};
  p.rope_table = {rope_table.data(), {table_rows, c.head_dim / 2, 2}, {c.head_dim, 2, 1}};
  p.dual_chunk = chunks;
  p.scratch = {scratch.data(), {scratch_bytes}, {1}};
  if (c.fp8) p.k_scale = p.v_scale = {cache_scale.data(), {c.kv_heads}, {1}};

  const Microseconds us =
      time_cold([&](cudaStream_t stream) { decode_attention_cuda(p, stream); }, options.runs);
  const double bytes = (c.fp8 ? 2.0 : 4.0) *  // K and V
                       static_cast<double>(c.batch * c.tokens * c.kv_heads * c.head_dim);
  const double gb_per_s = bytes / us.p50 * 1e-3;
  char fields[400];
  std::snprintf(fields, sizeof(fields),
                "\"op\": \"decode_attention\", \"batch\": %lld, \"tokens\": %lld, "
                "\"q_tokens\": %lld, \"q_heads\": %lld, \"kv_heads\": %lld, \"head_dim\": %lld, "
                "\"chunk_len\": %lld, \"cache\": \"%s\", \"share_of_copy\": %.3f",
                static_cast<long long>(c.batch), static_cast<long long>(c.tokens),
                static_cast<long long>(c.q_tokens), static_cast<long long>(c.q_heads),
                static_cast<long long>(c.kv_heads), static_cast<long long>(c.head_dim),
                static_cast<long long>(chunks.chunk_len()), c.fp8 ? "fp8" : "bf16",
                gb_per_s / copy);
  report.add(fields, us, "gb_per_s", gb_per_s);
  std::printf(
      "decode_attention | %3lld x %7lld tokens, %lld new, %lld/%lld x %lld%s%s | %9.1f us (%.1f to "
      "%.1f) | %7.1f GB/s, %.0f %% of a copy\n",
      static_cast<long long>(c.batch), static_cast<long long>(c.tokens),
      static_cast<long long>(c.q_tokens), static_cast<long long>(c.q_heads),
      static_cast<long long>(c.kv_heads), static_cast<long long>(c.head_dim),
      c.chunk_size == kInfiniteChunk ? "" : ", DCA", c.fp8 ? ", fp8" : "", us.p50, us.p10, us.p90,
      gb_per_s, 100 * gb_per_s / copy);
  std::fflush(stdout);
}

}  // namespace
}  // namespace qwen1m::bench

int main(int argc, char** argv) {
  using namespace qwen1m;
  return bench::run(argc, argv, [](const bench::Options& options, bench::Report& report) {
    std::vector<bench::Case> cases;
    for (const bool fp8 : {false, true}) {
      for (const int64_t tokens : {8192, 32768, 131072, 262144, 1010000}) {
        cases.push_back({1, tokens, 1, 28, 4, 128, 262144, 8192, fp8});  // the models' own chunks
        cases.push_back({1, tokens, 1, 40, 8, 128, 262144, 8192, fp8});
      }
      cases.push_back({1, 262144, 4, 28, 4, 128, 262144, 8192, fp8});  // 28 rows; fp8: two blocks
      cases.push_back({32, 8192, 1, 28, 4, 128, 262144, 8192, fp8});
      cases.push_back({1, 131072, 1, 14, 2, 64, 262144, 8192, fp8});
    }
    cases.push_back({1, 262144, 1, 28, 4, 128, kInfiniteChunk, 0});
    for (const int64_t q_tokens : {2, 8}) {  // speculative verification
      cases.push_back({1, 262144, q_tokens, 28, 4, 128, 262144, 8192});
    }
    cases.push_back({8, 131072, 1, 28, 4, 128, 262144, 8192});
    const double copy = bench::time_copy(options.runs).gb_per_s;
    std::printf("a copy: %.1f GB/s read and written\n", copy);
    for (const bench::Case& c : cases) bench::measure(c, options, copy, report);
  });
}
