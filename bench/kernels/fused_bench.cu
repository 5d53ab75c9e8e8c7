// The elementwise kernels without torch: bytes read and written per second, as a share of a device
// copy measured in the same run; and the time of one token, which is all launch.
#include "bench.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/embedding.h"
#include "qwen1m/qkv_rope_append.h"
#include "qwen1m/rms_norm.h"
#include "qwen1m/sample.h"
#include "qwen1m/swiglu.h"
#include "qwen1m/widen_pages.h"

namespace qwen1m::bench {
namespace {

class Fused {
 public:
  Fused(const Options& options, Report& report) : options_(options), report_(report) {
    const Copy copy = time_copy(options.runs);
    copy_rate_ = copy.gb_per_s;
    add("copy", "512 MB", copy.us, copy.bytes);
  }

  void rms_norm(int64_t tokens, int64_t hidden, bool has_residual) {
    const Buffer<bf16> x(tokens * hidden), residual(x.count()), out(x.count()), weight(hidden);
    for (const Buffer<bf16>* b : {&x, &residual, &weight}) fill_normal(*b, 1);
    RmsNormParams p{.out = rows(out, tokens, hidden),
                    .residual = {},
                    .x = rows(x, tokens, hidden),
                    .weight = {weight.data(), DType::kBFloat16, {hidden}, {1}},
                    .eps = 1e-6f};
    if (has_residual) p.residual = rows(residual, tokens, hidden);
    measure(has_residual ? "rms_norm + residual" : "rms_norm", text(tokens, hidden),
            (has_residual ? 4 : 2) * x.bytes(),
            [&](cudaStream_t stream) { rms_norm_cuda(p, stream); });
  }

  void swiglu(int64_t tokens, int64_t intermediate) {
    const Buffer<bf16> gate_up(tokens * 2 * intermediate), out(tokens * intermediate);
    fill_normal(gate_up, 1);
    const SwigluParams p{.out = rows(out, tokens, intermediate),
                         .gate_up = rows(gate_up, tokens, 2 * intermediate)};
    measure("swiglu", text(tokens, intermediate), gate_up.bytes() + out.bytes(),
            [&](cudaStream_t stream) { swiglu_cuda(p, stream); });
  }

  void embedding(int64_t tokens, int64_t hidden) {
    constexpr int64_t kVocab = 152064;
    const Buffer<bf16> weight(kVocab * hidden), out(tokens * hidden);
    fill_normal(weight, 1);
    std::vector<int64_t> ids(static_cast<size_t>(tokens));
    std::mt19937 random(2);
    for (int64_t& id : ids) id = random() % kVocab;
    const Buffer<int64_t> token_ids(ids);
    const EmbeddingParams p{.out = rows(out, tokens, hidden),
                            .weight = rows(weight, kVocab, hidden),
                            .token_ids = {token_ids.data(), {tokens}, {1}}};
    measure("embedding", text(tokens, hidden), 2 * out.bytes(),
            [&](cudaStream_t stream) { embedding_cuda(p, stream); });
  }

  /// Logits of one normal distribution with a few likely tokens, as a model's are, in fp32.
  void sample(int64_t batch, float temperature_of_all, int64_t k, float p_of_all) {
    constexpr int64_t kVocab = 152064;
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(static_cast<size_t>(batch * kVocab));
    for (float& value : values) value = normal(random);
    for (int64_t b = 0; b < batch; ++b) {
      for (int i = 0; i < 50; ++i) {
        values[static_cast<size_t>(b * kVocab + random() % kVocab)] = 20.0f - 0.3f * i;
      }
    }
    const auto n = static_cast<size_t>(batch);
    const Buffer<float> logits(values), temperature(std::vector<float>(n, temperature_of_all));
    const Buffer<float> top_p(std::vector<float>(n, p_of_all)), min_p(std::vector<float>(n, 0.0f));
    const Buffer<int64_t> top_k(std::vector<int64_t>(n, k)), seed(std::vector<int64_t>(n, 1));
    const Buffer<int64_t> position(std::vector<int64_t>(n, 2)), token_ids(batch);
    const Buffer<float> logprobs(batch);
    SampleParams p;
    p.token_ids = {token_ids.data(), {batch}, {1}};
    p.logprobs = {logprobs.data(), {batch}, {1}};
    p.logits = {logits.data(), DType::kFloat32, {batch, kVocab}, {kVocab, 1}};
    p.temperature = {temperature.data(), {batch}, {1}};
    p.top_k = {top_k.data(), {batch}, {1}};
    p.top_p = {top_p.data(), {batch}, {1}};
    p.min_p = {min_p.data(), {batch}, {1}};
    p.seed = {seed.data(), {batch}, {1}};
    p.position = {position.data(), {batch}, {1}};
    const std::string shape =
        std::to_string(batch) + " rows, T " + std::to_string(temperature_of_all).substr(0, 3) +
        ", top_k " + std::to_string(k) + ", top_p " + std::to_string(p_of_all).substr(0, 3);
    measure("sample", shape, logits.bytes(), [&](cudaStream_t stream) { sample_cuda(p, stream); });
  }

  /// Consecutive tokens of one sequence whose pages lie in random order.
  void qkv_rope_append(int64_t tokens, int64_t q_heads, int64_t kv_heads, bool fp8) {
    constexpr int64_t kDim = 128;
    const int64_t columns = (q_heads + 2 * kv_heads) * kDim;
    const int64_t num_pages = (tokens + kPageSize - 1) / kPageSize, page = kPageSize * kDim;
    const Buffer<bf16> qkv(tokens * columns), q(tokens * q_heads * kDim), bias(columns);
    const Buffer<bf16> k(num_pages * kv_heads * page), v(k.count());
    fill_normal(qkv, 1);
    fill_normal(bias, 2);
    std::vector<int64_t> order(static_cast<size_t>(num_pages)), place, slot;
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(4));
    for (int64_t t = 0; t < tokens; ++t) {
      place.push_back(t);
      slot.push_back(order[static_cast<size_t>(t / kPageSize)] * kPageSize + t % kPageSize);
    }
    const Buffer<int64_t> positions(place), slots(slot);
    const Buffer<float> table(std::vector<float>(static_cast<size_t>(tokens * kDim), 0.5f));
    QkvRopeAppendParams p;
    p.q = {q.data(), DType::kBFloat16, {tokens, q_heads, kDim}, {q_heads * kDim, kDim, 1}};
    p.k_cache = {k.data(),
                 DType::kBFloat16,
                 {num_pages, kv_heads, kPageSize, kDim},
                 {kv_heads * page, page, kDim, 1}};
    const Buffer<float> scale(std::vector<float>(static_cast<size_t>(kv_heads), 0.25f));
    if (fp8) {  // in half of the buffers
      p.k_cache.dtype = DType::kFloat8E4M3;
      p.k_scale = p.v_scale = {scale.data(), {kv_heads}, {1}};
    }
    p.v_cache = p.k_cache;
    p.v_cache.data = v.data();
    p.qkv = rows(qkv, tokens, columns);
    p.bias = {bias.data(), DType::kBFloat16, {columns}, {1}};
    p.positions = {positions.data(), {tokens}, {1}};
    p.slot_mapping = {slots.data(), {tokens}, {1}};
    p.rope_table = {table.data(), {tokens, kDim / 2, 2}, {kDim, 2, 1}};
    p.chunk_len = kInfiniteChunk;
    const std::string heads = std::to_string(q_heads) + "/" + std::to_string(kv_heads) + " heads";
    const int64_t saved = fp8 ? 2 * tokens * kv_heads * kDim : 0;
    measure("qkv_rope_append",
            std::to_string(tokens) + " tokens, " + heads + (fp8 ? ", fp8 cache" : ""),
            2 * qkv.bytes() + table.bytes() + positions.bytes() + slots.bytes() - saved,
            [&](cudaStream_t stream) { qkv_rope_append_cuda(p, stream); });
  }

  /// One layer's keys (or values) of a sequence, its pages in random order.
  void widen_pages(int64_t tokens, int64_t kv_heads) {
    constexpr int64_t kDim = 128;
    const int64_t num_pages = tokens / kPageSize, page = kPageSize * kDim;
    const Buffer<bf16> wide(num_pages * kv_heads * page);
    const Buffer<uint8_t> codes(std::vector<uint8_t>(static_cast<size_t>(wide.count()), 0x3a));
    const Buffer<float> scale(std::vector<float>(static_cast<size_t>(kv_heads), 0.25f));
    std::vector<int64_t> order(static_cast<size_t>(num_pages));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(4));
    const Buffer<int64_t> pages(order);
    WidenPagesParams p;
    p.wide = {wide.data(),
              DType::kBFloat16,
              {num_pages, kv_heads, kPageSize, kDim},
              {kv_heads * page, page, kDim, 1}};
    p.codes = p.wide;
    p.codes.dtype = DType::kFloat8E4M3;
    p.codes.data = codes.data();
    p.scale = {scale.data(), {kv_heads}, {1}};
    p.pages = {pages.data(), {num_pages}, {1}};
    measure("widen_pages",
            std::to_string(tokens) + " tokens, " + std::to_string(kv_heads) + " heads",
            wide.bytes() + codes.bytes() + pages.bytes(),
            [&](cudaStream_t stream) { widen_pages_cuda(p, stream); });
  }

 private:
  static AnyView<2> rows(const Buffer<bf16>& buffer, int64_t count, int64_t width) {
    return {buffer.data(), DType::kBFloat16, {count, width}, {width, 1}};
  }
  static std::string text(int64_t tokens, int64_t width) {
    return std::to_string(tokens) + " x " + std::to_string(width);
  }

  template <typename Work>
  void measure(const char* op, const std::string& shape, int64_t bytes, const Work& work) {
    add(op, shape, time_cold(work, options_.runs), bytes);
  }

  void add(const char* op, const std::string& shape, const Microseconds& us, int64_t bytes) {
    const double rate = static_cast<double>(bytes) / us.p50 * 1e-3;
    report_.add(std::string("\"op\": \"") + op + "\", \"shape\": \"" + shape +
                    "\", \"share_of_copy\": " + std::to_string(rate / copy_rate_),
                us, "gb_per_s", rate);
    std::printf("%-19s | %-36s | %8.1f us (%.1f to %.1f) | %6.0f GB/s | %5.1f %% of a copy\n", op,
                shape.c_str(), us.p50, us.p10, us.p90, rate, 100 * rate / copy_rate_);
    std::fflush(stdout);
  }

  Options options_;
  Report& report_;
  double copy_rate_ = 0;  // GB/s, read and written
};

}  // namespace
}  // namespace qwen1m::bench

int main(int argc, char** argv) {
  using namespace qwen1m::bench;
  return run(argc, argv, [](const Options& options, Report& report) {
    Fused fused(options, report);
    for (const int64_t tokens : {1, 4096, 32768}) {
      for (const int64_t hidden : {3584, 5120}) {
        fused.rms_norm(tokens, hidden, false);
        fused.rms_norm(tokens, hidden, true);
        fused.embedding(tokens, hidden);
      }
      for (const bool fp8 : {false, true}) {
        fused.qkv_rope_append(tokens, 28, 4, fp8);
        fused.qkv_rope_append(tokens, 40, 8, fp8);
      }
    }
    for (const int64_t tokens : {32768, 1 << 20}) {
      fused.widen_pages(tokens, 4);
      fused.widen_pages(tokens, 8);
    }
    for (const int64_t batch : {1, 8, 64}) {
      fused.sample(batch, 0.0f, 0, 1.0f);
      fused.sample(batch, 1.0f, 0, 1.0f);
      fused.sample(batch, 0.7f, 20, 0.8f);
    }
    for (const int64_t tokens : {1, 4096}) {
      fused.swiglu(tokens, 18944);
      fused.swiglu(tokens, 13824);
    }
  });
}
