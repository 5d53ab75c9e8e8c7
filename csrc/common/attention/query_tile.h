#pragma once
/// A query tile: rows of one KV head's query heads and of neighbouring tokens inside one DCA chunk,
/// and the walk of such a tile over its keys. Prefill walks all keys of the tile; decode walks
/// pieces and merges them; sparse prefill chooses its keys itself, step by step.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "common/attention/block_kernel.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

inline constexpr float kLog2E = 1.44269504f;

/// What the tiles of a call have in common.
struct AttentionContext {
  const void* q = nullptr;        // un-rotated; element strides below, last dimension contiguous
  const void* k_cache = nullptr;  // [pages, kv_heads, 128, D]
  const void* v_cache = nullptr;
  DType dtype = DType::kFloat32;        // of q, and of the steps
  DType cache_dtype = DType::kFloat32;  // the same, or float8_e4m3fn, which is widened page by page
  int64_t q_token_stride = 0, q_head_stride = 0;
  int64_t kv_heads = 0;
  int64_t group = 0;  // query heads of a KV head
  int64_t head_dim = 0;
  TensorView<const int32_t, 2> block_table;  // [batch, max_pages]
  TensorView<const float, 3> rope_table;     // [rows, D/2, 2]
  DualChunk dual_chunk;
  bool critical = false;  // queries take the positions of the sparse selection (dual_chunk.h)
};

struct QueryTile {
  int64_t q_offset = 0;  // elements from context.q to the first token's first head of the group
  int64_t batch = 0;     // row of the block table
  int64_t kv_head = 0;
  int64_t first_token = 0;             // absolute index
  int64_t num_tokens = 0;              // all in the DCA chunk of first_token
  const float* logit_scale = nullptr;  // of first_token
  int64_t logit_scale_stride = 0;      // to that of the next token; 0: all have one
  float key_scale = 1;                 // a factor of all logits

  int64_t last_token() const { return first_token + num_tokens - 1; }
  /// Of token first_token + index.
  float scale(int64_t index) const { return logit_scale[index * logit_scale_stride] * key_scale; }
  bool operator==(const QueryTile&) const = default;
};

/// Which of a token's three key ranges, hence which position its query is rotated to.
enum class Stage : uint8_t { kInter, kSuccessive, kIntra };

/// Calls f(first_token, num_tokens) for consecutive pieces of the tokens [begin, end): as long as
/// possible up to max_tokens, none across a DCA chunk border.
template <typename F>
void for_each_tile(const DualChunk& chunks, int64_t begin, int64_t end, int64_t max_tokens, F&& f) {
  while (begin < end) {
    const int64_t border = chunks.intra_begin(begin) + chunks.chunk_len();
    const int64_t n = std::min({max_tokens, end - begin, border - begin});
    f(begin, n);
    begin += n;
  }
}

/// What a walk leaves of a query row: out = o / l.
struct AttentionRow {
  const float* o = nullptr;  // D values, `stride` floats apart
  int64_t stride = 0;
  float m = 0, l = 0;  // running maximum of <q, k> (-inf: no key) and sum

  float norm() const { return l == 0 ? 0 : 1 / l; }
  /// ln sum_j exp(logit_scale <q, k_j>)
  float lse(float logit_scale) const {
    return static_cast<float>(double{m} * double{logit_scale} + std::log(double{l}));
  }
};

/// Keys of one stage in one KV head of the cache: [lo, hi) of a page.
struct PageKeys {
  int64_t page = 0;
  int lo = 0, hi = kPageSize;
  int64_t next_page = -1;  // a hint: the page to come, -1 if unknown
};

/// Scratch of one worker and the state of the tile it is at. Sized once; a walk does not allocate.
class TileWalker {
 public:
  TileWalker(BlockKernels, const AttentionContext&, int64_t max_rows);

  /// Attends `tile` to its visible keys in [key_begin, key_end), starting from nothing.
  /// Keys are visited in ascending order: inter, successive, intra (dual_chunk.h). A hint: this
  /// walker goes on with the same tile up to key fetch_end.
  void walk(const QueryTile& tile, int64_t key_begin, int64_t key_end, int64_t fetch_end) {
    walk({this, 1}, {&tile, 1}, key_begin, key_end, fetch_end);
  }

  /// The same for tiles of the same tokens in neighbouring KV heads, a walker each. The keys of all
  /// heads of a page lie side by side, and so do the values: memory is read in long stretches.
  static void walk(std::span<TileWalker> walkers, std::span<const QueryTile> tiles,
                   int64_t key_begin, int64_t key_end, int64_t fetch_end);

  /// The same walk in steps, for a caller that chooses the keys: begin, then for each stage enter
  /// and visits, then end. Nothing else runs on this thread between begin and end.
  void begin(const QueryTile&);
  void enter(Stage stage) { rotate_queries(tile_, stage); }
  void visit(const PageKeys&);
  /// Keys before the tile's first token, wherever they lie: rows [0, count) of k and v, [128, D].
  void visit_gathered(const void* k, const void* v, int count);
  void end();

  /// The state of row (token - first_token) * group + head of the tile that was walked last.
  AttentionRow row(int64_t index) const;

  /// What a step is made of, for steps of another kind. Values are not packed.
  const BlockKernel& kernel() const { return *kernel_; }
  std::span<LaneBlock> blocks() { return {blocks_.data(), static_cast<size_t>(num_blocks_)}; }
  PageTile pack_keys(const PageKeys&);

  /// [128, D] of the tile's KV head.
  const char* page_rows(const void* cache, int64_t page) const;

 private:
  PageTile pack(const PageKeys&);
  static void visit(std::span<TileWalker> walkers, const PageKeys&);
  /// Whether a step can be cut in halves: one block, nothing converted.
  bool reads_in_place() const;
  /// The queries of the stage go to the blocks; those that are there already stay.
  void rotate_queries(const QueryTile&, Stage);
  void attend(PageTile);
  /// Rows [lo, hi) of a page in the dtype of the steps; fp8 ones are widened into `buffer`.
  const void* widened(const char* rows, int lo, int hi, float* buffer) const;
  LaneBlock& block(int64_t index) { return blocks_[static_cast<size_t>(index)]; }

  struct Free {
    void operator()(float* p) const;
  };

  BlockKernels kernels_;
  const BlockKernel* kernel_ = nullptr;  // of the tile at hand
  const AttentionContext& context_;
  std::unique_ptr<float[], Free> memory_;
  std::vector<LaneBlock> blocks_;
  QueryTile tile_;                                          // at hand
  std::optional<std::pair<QueryTile, Stage>> rotated_for_;  // whose queries the blocks hold
  int64_t num_rows_ = 0, num_blocks_ = 0;                   // of the tile at hand
  PageTile page_;                                           // between its keys and its values
  float *rotated_, *k_pack_, *v_pack_, *scores_;
  float *k_page_ = nullptr, *v_page_ = nullptr;  // [128, D] of an fp8 cache, widened
  alignas(64) std::byte saved_[kSavedStateBytes];
};

}  // namespace qwen1m
