#include "common/attention/attention_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "common/fp8_cache.h"

namespace qwen1m {
namespace {

std::string element(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}
std::string element(const char* name, int64_t i, int64_t j) {
  return std::string(name) + "[" + std::to_string(i) + ", " + std::to_string(j) + "]";
}

/// `view` is written, so no two of its elements may share an address, as they do in an expanded
/// tensor: from the smallest stride up, each must step over all that lies inside.
template <typename View>
void check_no_overlap(const ArgCheck& args, const char* name, const View& view) {
  std::array<std::pair<int64_t, int64_t>, std::tuple_size_v<decltype(view.sizes)>> dims;
  for (size_t i = 0; i < dims.size(); ++i) dims[i] = {view.strides[i], view.sizes[i]};
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride < extent) {
      args.fail(name, "elements that do not overlap, because they are written",
                "shape " + shape_text(view.sizes) + " with strides " + shape_text(view.strides));
    }
    extent += stride * (size - 1);
  }
}

/// q has bound its names; its head_dim fits.
template <typename Q>
void check_q(const ArgCheck& args, const Q& q) {
  const int64_t head_dim = args.size("D");
  args.require(head_dim > 0 && head_dim % 16 == 0, "q", "head_dim D a multiple of 16", head_dim);
  args.dense_from(static_cast<int>(q.sizes.size()) - 1, "q", q);
}

/// `out` has the shape of q. Same for lse, as far as it goes.
template <typename Out, typename Q>
void check_out(const ArgCheck& args, const Out& out, const Q& q) {
  args.same_dtype("out", out, "q", q);
  args.dense_from(static_cast<int>(out.sizes.size()) - 1, "out", out);
  check_no_overlap(args, "out", out);
}

/// k_cache or v_cache; with a scale it is in fp8.
template <typename Q>
void check_cache(ArgCheck& args, const char* name, const AnyView<4>& cache, const Q& q,
                 const char* scale_name = "", const TensorView<const float, 1>& scale = {}) {
  args.shape(name, cache, {"pages", "kv_heads", kPageSize, "D"});
  check_cache_dtype(args, name, cache, q, scale_name, scale);
  args.dense_from(0, name, cache);
}

void check_caches(ArgCheck& args, const PrefillAttentionParams& p) {
  check_cache(args, "k_cache", p.k_cache, p.q);
  check_cache(args, "v_cache", p.v_cache, p.q);
}

void check_caches(ArgCheck& args, const DecodeAttentionParams& p) {
  check_scales_together(args, p.k_scale, p.v_scale);
  check_cache(args, "k_cache", p.k_cache, p.q, "k_scale", p.k_scale);
  check_cache(args, "v_cache", p.v_cache, p.q, "v_scale", p.v_scale);
}

/// The caches have been met.
void check_heads(const ArgCheck& args) {
  const int64_t kv_heads = args.size("kv_heads"), q_heads = args.size("q_heads");
  if (kv_heads <= 0 || q_heads <= 0 || q_heads % kv_heads != 0) {
    args.fail("q", "q_heads a positive multiple of kv_heads=" + std::to_string(kv_heads),
              std::to_string(q_heads));
  }
}

void check_rope_table(ArgCheck& args, const TensorView<const float, 3>& rope_table) {
  args.shape("rope_table", rope_table, {"rows", {"D/2", args.size("D") / 2}, 2});
  args.dense_from(0, "rope_table", rope_table);
}

void check_rope_rows(const ArgCheck& args, int64_t rows, int64_t tokens) {
  if (args.size("rows") < rows) {
    args.fail(
        "rope_table",
        "at least " + std::to_string(rows) + " rows for " + std::to_string(tokens) + " tokens",
        std::to_string(args.size("rows")));
  }
}

void require_scale(const ArgCheck& args, const std::string& name, float scale) {
  args.require(scale > 0 && std::isfinite(scale), name, "a finite scale > 0", scale);
}

/// Of sequence b.
void check_scale(const ArgCheck& args, const TensorView<const float, 1>& logit_scale, int64_t b) {
  require_scale(args, element("logit_scale", b), *logit_scale.at(b));
}

/// Of all its rows.
void check_scale(const ArgCheck& args, const TensorView<const float, 2>& logit_scale, int64_t b) {
  for (int64_t t = 0; t < logit_scale.size(1); ++t) {
    require_scale(args, element("logit_scale", b, t), *logit_scale.at(b, t));
  }
}

/// The pages of sequence b's first `tokens` tokens.
void check_pages(const ArgCheck& args, const TensorView<const int32_t, 2>& block_table, int64_t b,
                 int64_t tokens) {
  const int64_t pages = args.size("pages");
  for (int64_t i = 0; i * kPageSize < tokens; ++i) {
    const int64_t page = *block_table.at(b, i);
    if (page < 0 || page >= pages) {
      args.fail(element("block_table", b, i),
                "a page in [0, pages = " + std::to_string(pages) + ")", std::to_string(page));
    }
  }
}

/// Shapes, strides and dtypes of the arguments that prefill and decode have, once q has bound its
/// names.
template <typename Params>
void check_common_layout(ArgCheck& args, const Params& p) {
  check_q(args, p.q);
  check_out(args, p.out, p.q);
  if (p.lse) check_no_overlap(args, "lse", p.lse);
  check_caches(args, p);
  check_heads(args);
  args.shape("kv_len", p.kv_len, {"batch"});
  args.shape("block_table", p.block_table, {"batch", "max_pages"});
  check_rope_table(args, p.rope_table);
  check_dual_chunk(args, p.dual_chunk);
}

/// Their values.
template <typename Params>
void check_common_values(const ArgCheck& args, const Params& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.kv_len.size(0); ++b) {
    const int64_t kv_len = *p.kv_len.at(b), capacity = p.block_table.size(1) * kPageSize;
    if (kv_len < 0 || kv_len > capacity) {
      args.fail(element("kv_len", b),
                "a length in [0, max_pages * 128 = " + std::to_string(capacity) + "]",
                std::to_string(kv_len));
    }
    longest = std::max(longest, kv_len);
    check_scale(args, p.logit_scale, b);
    check_pages(args, p.block_table, b, kv_len);
  }
  check_rope_rows(args, p.dual_chunk.table_rows(longest), longest);
}

/// segment_end tokens fit the block table.
void check_segment_end(const ArgCheck& args, int64_t segment_end) {
  const int64_t capacity = args.size("max_pages") * kPageSize;
  if (segment_end <= 0 || segment_end > capacity) {
    args.fail("segment_end", "a length in [1, max_pages * 128 = " + std::to_string(capacity) + "]",
              std::to_string(segment_end));
  }
}

/// Tokens [begin, end) lie in one Dual Chunk.
void check_one_chunk(const ArgCheck& args, const char* name, const DualChunk& chunks, int64_t begin,
                     int64_t end) {
  if (chunks.chunk(begin) != chunks.chunk(end - 1)) {
    args.fail(name,
              "tokens of one Dual Chunk: that of the last one begins at " +
                  std::to_string(chunks.intra_begin(end - 1)),
              std::to_string(begin));
  }
}

}  // namespace

namespace {

void check_layout(ArgCheck& args, const PrefillAttentionParams& p) {
  args.shape("q", p.q, {"tokens", "q_heads", "D"});
  args.shape("out", p.out, {"tokens", "q_heads", "D"});
  if (p.lse) args.shape("lse", p.lse, {"tokens", "q_heads"});
  args.shape("kv_len", p.kv_len, {"batch"});
  args.shape("cu_q", p.cu_q, {{"batch + 1", args.size("batch") + 1}});
  args.shape("logit_scale", p.logit_scale, {"batch"});
  check_common_layout(args, p);
}

void check_layout(ArgCheck& args, const DecodeAttentionParams& p) {
  args.shape("q", p.q, {"batch", "q_tokens", "q_heads", "D"});
  args.shape("out", p.out, {"batch", "q_tokens", "q_heads", "D"});
  if (p.lse) args.shape("lse", p.lse, {"batch", "q_tokens", "q_heads"});
  args.shape("logit_scale", p.logit_scale, {"batch", "q_tokens"});
  check_common_layout(args, p);
}

void check_layout(ArgCheck& args, const SparseEstimateParams& p) {
  args.shape("q", p.q, {"n", "q_heads", "D"});
  check_q(args, p.q);
  const int64_t rows = args.size("n");
  args.require(rows > 0, "q", "at least one row", rows);
  check_cache(args, "k_cache", p.k_cache, p.q);
  check_heads(args);
  args.shape("block_table", p.block_table, {1, "max_pages"});
  args.shape("logit_scale", p.logit_scale, {1});
  check_rope_table(args, p.rope_table);
  check_dual_chunk(args, p.dual_chunk);
  check_segment_end(args, p.segment_end);
  args.shape("vertical", p.vertical, {"q_heads", {"segment_end", p.segment_end}});
  args.shape("slash", p.slash, {"q_heads", {"segment_end", p.segment_end}});
  args.dense_from(1, "vertical", p.vertical);
  args.dense_from(1, "slash", p.slash);
  check_no_overlap(args, "vertical", p.vertical);
  check_no_overlap(args, "slash", p.slash);
  if (rows > p.segment_end) {
    args.fail("q", "at most segment_end=" + std::to_string(p.segment_end) + " rows",
              std::to_string(rows));
  }
  const DualChunk& chunks = p.dual_chunk;
  check_one_chunk(args, "q", chunks, p.segment_end - rows, p.segment_end);
  int64_t table_rows = chunks.table_rows(p.segment_end);
  if (p.critical && p.segment_end > chunks.chunk_len()) {
    const int64_t last = p.segment_end - 1;
    table_rows = std::max(table_rows, chunks.chunk(last) > 1
                                          ? chunks.critical_inter_position(last) + 1
                                          : chunks.critical_successive_position(last) + 1);
  }
  check_rope_rows(args, table_rows, p.segment_end);
}

void check_layout(ArgCheck& args, const SparsePrefillParams& p) {
  args.shape("q", p.q, {"tokens", "q_heads", "D"});
  args.shape("out", p.out, {"tokens", "q_heads", "D"});
  check_q(args, p.q);
  check_out(args, p.out, p.q);
  if (p.lse) {
    args.shape("lse", p.lse, {"tokens", "q_heads"});
    check_no_overlap(args, "lse", p.lse);
  }
  check_cache(args, "k_cache", p.k_cache, p.q);
  check_cache(args, "v_cache", p.v_cache, p.q);
  check_heads(args);
  args.shape("block_table", p.block_table, {1, "max_pages"});
  args.shape("logit_scale", p.logit_scale, {1});
  check_rope_table(args, p.rope_table);
  check_dual_chunk(args, p.dual_chunk);
  args.shape("verticals", p.verticals, {"q_heads", "vertical capacity"});
  args.shape("vertical_count", p.vertical_count, {"q_heads", kStages});
  args.shape("runs", p.runs, {"q_heads", kStages, "run capacity", 2});
  args.shape("run_count", p.run_count, {"q_heads", kStages});
  args.dense_from(0, "verticals", p.verticals);
  args.dense_from(0, "runs", p.runs);
  if (p.scratch) {
    args.shape("scratch", p.scratch,
               {2, "q_heads", {"vertical capacity + 1", args.size("vertical capacity") + 1}, "D"});
    args.same_dtype("scratch", p.scratch, "q", p.q);
    args.dense_from(0, "scratch", p.scratch);
  }

  check_segment_end(args, p.segment_end);
  args.require(p.segment_end < int64_t{1} << 31, "segment_end", "less than 2^31", p.segment_end);
  if (p.segment_begin < 0 || p.segment_begin >= p.segment_end) {
    args.fail("segment_begin", "a token in [0, segment_end=" + std::to_string(p.segment_end) + ")",
              std::to_string(p.segment_begin));
  }
  check_one_chunk(args, "segment_begin", p.dual_chunk, p.segment_begin, p.segment_end);
  const int64_t tokens = args.size("tokens");
  if (p.q_begin < p.segment_begin || p.q_begin > p.segment_end - tokens) {
    args.fail("q_begin",
              "the first of " + std::to_string(tokens) +
                  " tokens in [segment_begin=" + std::to_string(p.segment_begin) +
                  ", segment_end=" + std::to_string(p.segment_end) + ")",
              std::to_string(p.q_begin));
  }
  const bool tile_fits = p.exact
                             ? p.tile_tokens == 64
                             : p.tile_tokens > 0 && p.tile_tokens <= 512 && p.tile_tokens % 64 == 0;
  args.require(tile_fits, "tile_tokens",
               p.exact ? "64, the tile of the exact mode" : "a multiple of 64 up to 512",
               p.tile_tokens);
  check_rope_rows(args, p.dual_chunk.table_rows(p.segment_end), p.segment_end);
}

}  // namespace

void check_dual_chunk(const ArgCheck& args, const DualChunk& chunks) {
  args.require(chunks.chunk_size > 0 && chunks.chunk_size <= kInfiniteChunk, "chunk_size",
               "a number of tokens in [1, 2^62]", chunks.chunk_size);
  if (chunks.local_size < 0 || chunks.local_size >= chunks.chunk_size) {
    args.fail("local_size", "0 <= local_size < chunk_size=" + std::to_string(chunks.chunk_size),
              std::to_string(chunks.local_size));
  }
}

void check_attention_layout(const PrefillAttentionParams& p) {
  ArgCheck args("prefill_attention");
  check_layout(args, p);
}

void check_attention_layout(const DecodeAttentionParams& p) {
  ArgCheck args("decode_attention");
  check_layout(args, p);
}

void check_attention(const PrefillAttentionParams& p) {
  ArgCheck args("prefill_attention");
  check_layout(args, p);
  check_common_values(args, p);
  const int64_t batch = args.size("batch"), tokens = args.size("tokens");
  if (*p.cu_q.at(0) != 0) args.fail("cu_q[0]", "0", std::to_string(*p.cu_q.at(0)));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = *p.cu_q.at(b), end = *p.cu_q.at(b + 1), kv_len = *p.kv_len.at(b);
    if (end < begin || end > tokens) {
      args.fail(element("cu_q", b + 1),
                "a row in [" + std::to_string(begin) + ", tokens = " + std::to_string(tokens) + "]",
                std::to_string(end));
    }
    if (kv_len < end - begin) {
      args.fail(element("kv_len", b),
                "at least the " + std::to_string(end - begin) + " query rows of the sequence",
                std::to_string(kv_len));
    }
  }
  if (*p.cu_q.at(batch) != tokens) {
    args.fail(element("cu_q", batch), "tokens = " + std::to_string(tokens),
              std::to_string(*p.cu_q.at(batch)));
  }
}

void check_attention(const DecodeAttentionParams& p) {
  ArgCheck args("decode_attention");
  check_layout(args, p);
  check_common_values(args, p);
  check_cache_scales(args, "k_scale", p.k_scale);
  check_cache_scales(args, "v_scale", p.v_scale);

  const int64_t q_tokens = args.size("q_tokens");
  for (int64_t b = 0; b < args.size("batch"); ++b) {
    const int64_t kv_len = *p.kv_len.at(b);
    if (kv_len != 0 && kv_len < q_tokens) {
      args.fail(element("kv_len", b),
                "0, or at least the q_tokens = " + std::to_string(q_tokens) + " query rows",
                std::to_string(kv_len));
    }
  }
}

void check_attention_layout(const SparseEstimateParams& p) {
  ArgCheck args("sparse_estimate");
  check_layout(args, p);
}

void check_attention(const SparseEstimateParams& p) {
  ArgCheck args("sparse_estimate");
  check_layout(args, p);
  check_scale(args, p.logit_scale, 0);
  check_pages(args, p.block_table, 0, p.segment_end);
}

void check_attention_layout(const SparsePrefillParams& p) {
  ArgCheck args("sparse_prefill");
  check_layout(args, p);
}

void check_attention(const SparsePrefillParams& p) {
  ArgCheck args("sparse_prefill");
  check_layout(args, p);
  check_scale(args, p.logit_scale, 0);
  check_pages(args, p.block_table, 0, p.segment_end);
  const DualChunk& chunks = p.dual_chunk;
  const int64_t borders[] = {0, chunks.successive_begin(p.segment_begin),
                             chunks.intra_begin(p.segment_begin), p.segment_end};
  for (int64_t h = 0; h < args.size("q_heads"); ++h) {
    int64_t next = 0, key = -1;
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const auto list = [&](const char* name, const char* index = "") {
        return std::string(name) + "[" + std::to_string(h) + ", " + std::to_string(stage) + "]" +
               index;
      };
      const int64_t verticals = *p.vertical_count.at(h, stage), runs = *p.run_count.at(h, stage);
      args.require(verticals >= 0 && next + verticals <= p.verticals.size(1),
                   list("vertical_count"), "a count within the capacity of verticals", verticals);
      args.require(runs >= 0 && runs <= p.runs.size(2), list("run_count"),
                   "a count within the capacity of runs", runs);
      for (int64_t i = 0; i < verticals; ++i, ++next) {
        const int64_t v = *p.verticals.at(h, next);
        if (v <= key || v < borders[stage] || v >= borders[stage + 1]) {
          args.fail("verticals[" + std::to_string(h) + ", " + std::to_string(next) + "]",
                    "ascending keys, in [" + std::to_string(borders[stage]) + ", " +
                        std::to_string(borders[stage + 1]) + ") in stage " + std::to_string(stage),
                    std::to_string(v));
        }
        key = v;
      }
      const int64_t apart = p.exact ? 1 : p.tile_tokens;
      int64_t last = -apart;
      for (int64_t i = 0; i < runs; ++i) {
        const int64_t lo = *p.runs.at(h, stage, i, 0), hi = *p.runs.at(h, stage, i, 1);
        if (lo < 0 || hi <= lo || hi > p.segment_end || lo - last < apart) {
          args.fail(list("runs", (", run " + std::to_string(i)).c_str()),
                    "ascending offsets lo < hi <= segment_end, at least " + std::to_string(apart) +
                        " from the run before",
                    std::string("[") + std::to_string(lo) + ", " + std::to_string(hi) + ")");
        }
        last = hi;
      }
    }
  }
}

}  // namespace qwen1m
