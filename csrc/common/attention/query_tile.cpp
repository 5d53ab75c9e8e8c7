#include "common/attention/query_tile.h"

#include <algorithm>
#include <limits>
#include <new>

#include "common/widen_fp8.h"

namespace qwen1m {
namespace {

constexpr int64_t kAlignFloats = 16;  // a cache line

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

int64_t query_position(const AttentionContext& context, Stage stage, int64_t token) {
  const DualChunk& chunks = context.dual_chunk;
  switch (stage) {
    case Stage::kInter:
      return context.critical ? chunks.critical_inter_position(token) : chunks.inter_position();
    case Stage::kSuccessive:
      return context.critical ? chunks.critical_successive_position(token)
                              : chunks.successive_position(token);
    case Stage::kIntra:
      break;
  }
  return chunks.intra_position(token);
}

/// out = R x; pairs are (d, d + D/2), cos_sin one row of the rotary table.
template <typename T>
void rotate(const T* x, const float* cos_sin, int64_t half, float* out) {
  for (int64_t d = 0; d < half; ++d) {
    const float c = cos_sin[2 * d], s = cos_sin[2 * d + 1];
    const float a = static_cast<float>(x[d]), b = static_cast<float>(x[half + d]);
    out[d] = a * c - b * s;
    out[half + d] = b * c + a * s;
  }
}

}  // namespace

void TileWalker::Free::operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }

TileWalker::TileWalker(BlockKernels kernels, const AttentionContext& context, int64_t max_rows)
    : kernels_(kernels), context_(context) {
  // The widest needs the largest buffers, but a narrower one may need more of them.
  const BlockKernel& kernel = *kernels.begin();
  const int64_t dim = context.head_dim, lanes = kernel.lanes;
  size_t num_blocks = 0;
  for (const BlockKernel& k : kernels) {
    if (num_blocks == 0 || may_take_several_blocks(k)) {
      num_blocks = static_cast<size_t>((max_rows + k.lanes - 1) / k.lanes);
    }
  }
  blocks_.resize(num_blocks);

  // One allocation; every piece starts on a cache line.
  const auto lay_out = [&](float* base) {
    int64_t floats = 0;
    const auto take = [&](int64_t n) {
      float* p = base == nullptr ? nullptr : base + floats;
      floats += round_up(n, kAlignFloats);
      return p;
    };
    rotated_ = take(lanes * dim);
    scores_ = take(kPageSize * lanes);
    v_pack_ = take(kernel.v_pack_floats(dim));
    k_pack_ = take(kernel.k_pack_floats(dim));
    if (context.cache_dtype != context.dtype) {
      k_page_ = take(kPageSize * dim);
      v_page_ = take(kPageSize * dim);
    }
    for (LaneBlock& b : blocks_) {
      b.q = take(kernel.q_floats(dim));
      b.o = take(dim * lanes);
      b.m = take(lanes);
      b.l = take(lanes);
      b.log2_scale = take(lanes);
      b.token_offset = reinterpret_cast<int32_t*>(take(lanes));
    }
    return floats;
  };
  const auto bytes = static_cast<size_t>(lay_out(nullptr)) * sizeof(float);
  memory_.reset(static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
  lay_out(memory_.get());
}

void TileWalker::begin(const QueryTile& tile) {
  tile_ = tile;
  const int64_t group = context_.group;
  num_rows_ = tile.num_tokens * group;
  kernel_ = &choose_lanes(kernels_, num_rows_);
  const int64_t lanes = kernel_->lanes;
  num_blocks_ = (num_rows_ + lanes - 1) / lanes;
  for (int64_t i = 0; i < num_blocks_; ++i) {
    LaneBlock& b = block(i);
    const int64_t first_row = i * lanes;
    b.lanes = kernel_->lanes;
    b.first_token = tile.first_token + first_row / group;
    b.rows = static_cast<int>(std::min(lanes, num_rows_ - first_row));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      // Lanes without a row see what the last row sees; their queries are 0.
      const int64_t row = std::min(first_row + lane, num_rows_ - 1);
      b.token_offset[lane] = static_cast<int32_t>(tile.first_token + row / group - b.first_token);
      b.log2_scale[lane] = tile.scale(row / group) * kLog2E;
    }
    std::fill_n(b.o, context_.head_dim * lanes, 0.0f);
    std::fill_n(b.m, lanes, -std::numeric_limits<float>::infinity());
    std::fill_n(b.l, lanes, 0.0f);
  }
  if (kernel_->begin != nullptr) kernel_->begin(saved_);
}

void TileWalker::end() {
  if (kernel_->end != nullptr) kernel_->end(saved_);
}

void TileWalker::rotate_queries(const QueryTile& tile, Stage stage) {
  // Decode walks one tile piece by piece: up to 2 % of its time would go into rotating again.
  if (rotated_for_ == std::pair(tile, stage)) return;
  rotated_for_ = {tile, stage};
  const int64_t dim = context_.head_dim, lanes = kernel_->lanes, group = context_.group;
  for (int64_t i = 0; i < num_blocks_; ++i) {
    const int64_t first_row = i * lanes;
    for (int64_t lane = 0; lane < block(i).rows; ++lane) {
      const int64_t token = (first_row + lane) / group, head = (first_row + lane) % group;
      const int64_t offset =
          tile.q_offset + token * context_.q_token_stride + head * context_.q_head_stride;
      const float* cos_sin =
          context_.rope_table.at(query_position(context_, stage, tile.first_token + token));
      float* out = rotated_ + lane * dim;
      if (context_.dtype == DType::kFloat32) {
        rotate(static_cast<const float*>(context_.q) + offset, cos_sin, dim / 2, out);
      } else {
        rotate(static_cast<const bf16*>(context_.q) + offset, cos_sin, dim / 2, out);
      }
    }
    kernel_->pack_queries(rotated_, block(i).rows, dim, block(i).q);
  }
}

const char* TileWalker::page_rows(const void* cache, int64_t page) const {
  const int64_t physical = *context_.block_table.at(tile_.batch, page);
  const int64_t elems =
      (physical * context_.kv_heads + tile_.kv_head) * kPageSize * context_.head_dim;
  return static_cast<const char*>(cache) + elems * element_size(context_.cache_dtype);
}

const void* TileWalker::widened(const char* rows, int lo, int hi, float* buffer) const {
  if (context_.cache_dtype == context_.dtype) return rows;
  const int64_t first = lo * context_.head_dim, count = (hi - lo) * context_.head_dim;
  auto* to = reinterpret_cast<char*>(buffer) + first * element_size(context_.dtype);
  widen_fp8(reinterpret_cast<const e4m3*>(rows) + first, count, context_.dtype, to);
  return buffer;
}

void TileWalker::attend(PageTile page) {
  for (LaneBlock& b : blocks()) {
    kernel_->attend(b, page, context_.head_dim, scores_);
    page.next_k = page.next_v = nullptr;  // once is enough
    page.page_bytes = 0;
  }
}

PageTile TileWalker::pack(const PageKeys& keys) {
  const int64_t dim = context_.head_dim;
  PageTile page =
      kernel_->pack_page(widened(page_rows(context_.k_cache, keys.page), keys.lo, keys.hi, k_page_),
                         widened(page_rows(context_.v_cache, keys.page), keys.lo, keys.hi, v_page_),
                         dim, keys.lo, keys.hi, k_pack_, v_pack_);
  page.begin = keys.page * kPageSize;
  page.page_bytes = kPageSize * dim * element_size(context_.cache_dtype);
  if (keys.next_page >= 0) {
    page.next_k = page_rows(context_.k_cache, keys.next_page);
    page.next_v = page_rows(context_.v_cache, keys.next_page);
  }
  return page;
}

void TileWalker::visit(const PageKeys& keys) { attend(pack(keys)); }

void TileWalker::visit(std::span<TileWalker> walkers, const PageKeys& keys) {
  const TileWalker& front = walkers.front();
  if (!front.reads_in_place()) {
    for (TileWalker& walker : walkers) walker.visit(keys);
    return;
  }
  // All keys, then all values; fetched meanwhile: what is read next.
  for (TileWalker& walker : walkers) walker.page_ = walker.pack(keys);
  const char* const following_k = front.page_.next_k;
  for (size_t i = 0; i < walkers.size(); ++i) {
    const bool last = i + 1 == walkers.size();
    PageTile& page = walkers[i].page_;
    page.next_k = static_cast<const char*>(last ? front.page_.v : walkers[i + 1].page_.k);
    page.next_v = last ? following_k : static_cast<const char*>(walkers[i + 1].page_.v);
  }
  for (TileWalker& walker : walkers) {
    walker.kernel_->score(walker.block(0), walker.page_, walker.context_.head_dim, walker.scores_);
  }
  for (TileWalker& walker : walkers) {
    walker.kernel_->weigh(walker.block(0), walker.page_, walker.context_.head_dim, walker.scores_);
  }
}

bool TileWalker::reads_in_place() const {
  return kernel_->score != nullptr && num_blocks_ == 1 && context_.cache_dtype == context_.dtype &&
         kernel_->k_pack_floats(context_.head_dim) == 0;
}

void TileWalker::visit_gathered(const void* k, const void* v, int count) {
  PageTile page = kernel_->pack_page(k, v, context_.head_dim, 0, count, k_pack_, v_pack_);
  page.begin = tile_.first_token - kPageSize;  // every row sees every key
  attend(page);
}

PageTile TileWalker::pack_keys(const PageKeys& keys) {
  PageTile page = kernel_->pack_page(page_rows(context_.k_cache, keys.page), nullptr,
                                     context_.head_dim, keys.lo, keys.hi, k_pack_, v_pack_);
  page.begin = keys.page * kPageSize;
  if (keys.next_page >= 0) {
    page.next_k = page_rows(context_.k_cache, keys.next_page);
    page.page_bytes = kPageSize * context_.head_dim * element_size(context_.dtype);
  }
  return page;
}

void TileWalker::walk(std::span<TileWalker> walkers, std::span<const QueryTile> tiles,
                      int64_t key_begin, int64_t key_end, int64_t fetch_end) {
  const QueryTile& tile = tiles.front();  // all are of its tokens
  const DualChunk& chunks = walkers.front().context_.dual_chunk;
  fetch_end = std::min(fetch_end, tile.last_token() + 1);
  for (size_t i = 0; i < tiles.size(); ++i) walkers[i].begin(tiles[i]);
  const int64_t intra = chunks.intra_begin(tile.first_token);
  const int64_t successive = chunks.successive_begin(tile.first_token);
  const int64_t borders[] = {0, successive, intra, tile.last_token() + 1};
  for (int stage = 0; stage < 3; ++stage) {
    const int64_t first = std::max(borders[stage], key_begin);
    const int64_t last = std::min(borders[stage + 1], key_end);
    if (first >= last) continue;
    for (size_t i = 0; i < tiles.size(); ++i) walkers[i].enter(static_cast<Stage>(stage));
    for (int64_t page = first / kPageSize; page * kPageSize < last; ++page) {
      const int64_t page_begin = page * kPageSize, page_end = page_begin + kPageSize;
      visit(walkers.first(tiles.size()),
            {.page = page,
             .lo = static_cast<int>(std::max(first - page_begin, int64_t{0})),
             .hi = static_cast<int>(std::min(last - page_begin, kPageSize)),
             .next_page = page_end < fetch_end ? page + 1 : -1});
    }
  }
  for (size_t i = 0; i < tiles.size(); ++i) walkers[i].end();
}

AttentionRow TileWalker::row(int64_t index) const {
  const LaneBlock& b = blocks_[static_cast<size_t>(index / kernel_->lanes)];
  const int64_t lane = index % kernel_->lanes;
  const bool lane_dim = kernel_->output == OutputLayout::kLaneDim;
  return {.o = b.o + (lane_dim ? lane * context_.head_dim : lane),
          .stride = lane_dim ? 1 : kernel_->lanes,
          .m = b.m[lane],
          .l = b.l[lane]};
}

}  // namespace qwen1m
