#include "common/attention/attention_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

namespace qwen1m {
namespace {

std::string element(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
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

/// Shapes, strides and dtypes of the arguments that both ops have, once q has bound its names.
template <typename Params>
void check_common_layout(ArgCheck& args, const Params& p) {
  const int64_t head_dim = args.size("D"), q_heads = args.size("q_heads");
  constexpr int kLastDim = static_cast<int>(std::tuple_size_v<decltype(p.q.sizes)>) - 1;
  args.require(head_dim > 0 && head_dim % 16 == 0, "q", "head_dim D a multiple of 16", head_dim);
  args.dense_from(kLastDim, "q", p.q);
  args.same_dtype("out", p.out, "q", p.q);
  args.dense_from(kLastDim, "out", p.out);
  check_no_overlap(args, "out", p.out);
  if (p.lse) check_no_overlap(args, "lse", p.lse);

  args.shape("k_cache", p.k_cache, {"pages", "kv_heads", kPageSize, "D"});
  args.same_dtype("k_cache", p.k_cache, "q", p.q);
  args.dense_from(0, "k_cache", p.k_cache);
  args.shape("v_cache", p.v_cache, {"pages", "kv_heads", kPageSize, "D"});
  args.same_dtype("v_cache", p.v_cache, "q", p.q);
  args.dense_from(0, "v_cache", p.v_cache);
  const int64_t kv_heads = args.size("kv_heads");
  if (kv_heads <= 0 || q_heads <= 0 || q_heads % kv_heads != 0) {
    args.fail("q", "q_heads a positive multiple of kv_heads=" + std::to_string(kv_heads),
              std::to_string(q_heads));
  }

  args.shape("kv_len", p.kv_len, {"batch"});
  args.shape("block_table", p.block_table, {"batch", "max_pages"});
  args.shape("logit_scale", p.logit_scale, {"batch"});
  args.shape("rope_table", p.rope_table, {"rows", {"D/2", head_dim / 2}, 2});
  args.dense_from(0, "rope_table", p.rope_table);
  args.require(p.dual_chunk.chunk_size > 0 && p.dual_chunk.chunk_size <= kInfiniteChunk,
               "chunk_size", "a number of tokens in [1, 2^62]", p.dual_chunk.chunk_size);
  if (p.dual_chunk.local_size < 0 || p.dual_chunk.local_size >= p.dual_chunk.chunk_size) {
    args.fail("local_size",
              "0 <= local_size < chunk_size=" + std::to_string(p.dual_chunk.chunk_size),
              std::to_string(p.dual_chunk.local_size));
  }
}

/// Their values.
template <typename Params>
void check_common_values(const ArgCheck& args, const Params& p) {
  const int64_t pages = args.size("pages");
  int64_t longest = 0;
  for (int64_t b = 0; b < p.kv_len.size(0); ++b) {
    const int64_t kv_len = *p.kv_len.at(b), capacity = p.block_table.size(1) * kPageSize;
    if (kv_len < 0 || kv_len > capacity) {
      args.fail(element("kv_len", b),
                "a length in [0, max_pages * 128 = " + std::to_string(capacity) + "]",
                std::to_string(kv_len));
    }
    longest = std::max(longest, kv_len);
    const float scale = *p.logit_scale.at(b);
    args.require(scale > 0 && std::isfinite(scale), element("logit_scale", b), "a finite scale > 0",
                 scale);
    for (int64_t i = 0; i * kPageSize < kv_len; ++i) {
      const int64_t page = *p.block_table.at(b, i);
      if (page < 0 || page >= pages) {
        args.fail("block_table[" + std::to_string(b) + ", " + std::to_string(i) + "]",
                  "a page in [0, pages = " + std::to_string(pages) + ")", std::to_string(page));
      }
    }
  }
  const int64_t rows = p.dual_chunk.table_rows(longest);
  if (args.size("rows") < rows) {
    args.fail(
        "rope_table",
        "at least " + std::to_string(rows) + " rows for " + std::to_string(longest) + " tokens",
        std::to_string(args.size("rows")));
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
  check_common_layout(args, p);
}

}  // namespace

void check_attention_layout(const PrefillAttentionParams& p) {
  ArgCheck args("prefill_attention");
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
  args.shape("q", p.q, {"batch", "q_tokens", "q_heads", "D"});
  args.shape("out", p.out, {"batch", "q_tokens", "q_heads", "D"});
  if (p.lse) args.shape("lse", p.lse, {"batch", "q_tokens", "q_heads"});
  check_common_layout(args, p);
  check_common_values(args, p);

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

}  // namespace qwen1m
