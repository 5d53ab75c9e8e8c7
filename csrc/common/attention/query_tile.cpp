#include "common/attention/query_tile.h"

#include <algorithm>
#include <limits>
#include <new>

namespace qwen1m {
namespace {

constexpr int64_t kAlignFloats = 16;  // a cache line

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

int64_t query_position(const DualChunk& chunks, Stage stage, int64_t token) {
  switch (stage) {
    case Stage::kInter:
      return chunks.inter_position();
    case Stage::kSuccessive:
      return chunks.successive_position(token);
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
  const BlockKernel& kernel = *kernels.begin();  // the widest: a narrower one needs one block only
  const int64_t dim = context.head_dim, lanes = kernel.lanes;
  blocks_.resize(static_cast<size_t>((max_rows + lanes - 1) / lanes));

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
    for (LaneBlock& b : blocks_) {
      b.q = take(kernel.q_floats(dim));
      b.o = take(dim * lanes);
      b.m = take(lanes);
      b.l = take(lanes);
      b.token_offset = reinterpret_cast<int32_t*>(take(lanes));
    }
    return floats;
  };
  const auto bytes = static_cast<size_t>(lay_out(nullptr)) * sizeof(float);
  memory_.reset(static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
  lay_out(memory_.get());
}

void TileWalker::start(const QueryTile& tile) {
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
    }
    std::fill_n(b.o, context_.head_dim * lanes, 0.0f);
    std::fill_n(b.m, lanes, -std::numeric_limits<float>::infinity());
    std::fill_n(b.l, lanes, 0.0f);
  }
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
      const float* cos_sin = context_.rope_table.at(
          query_position(context_.dual_chunk, stage, tile.first_token + token));
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

const char* TileWalker::page_rows(const void* cache, const QueryTile& tile, int64_t page) const {
  const int64_t physical = *context_.block_table.at(tile.batch, page);
  const int64_t elems =
      (physical * context_.kv_heads + tile.kv_head) * kPageSize * context_.head_dim;
  return static_cast<const char*>(cache) + elems * element_size(context_.dtype);
}

void TileWalker::visit_page(const QueryTile& tile, int64_t page, int64_t key_begin,
                            int64_t key_end) {
  const int64_t begin = page * kPageSize, dim = context_.head_dim;
  const auto lo = static_cast<int>(std::max(key_begin - begin, int64_t{0}));
  const auto hi = static_cast<int>(std::min(key_end - begin, kPageSize));
  const char* k = page_rows(context_.k_cache, tile, page);
  const char* v = page_rows(context_.v_cache, tile, page);
  PageTile page_tile = kernel_->pack_page(k, v, dim, lo, hi, k_pack_, v_pack_);
  page_tile.begin = begin;
  page_tile.page_bytes = kPageSize * dim * element_size(context_.dtype);
  if (begin + kPageSize < fetch_end_) {
    page_tile.next_k = page_rows(context_.k_cache, tile, page + 1);
    page_tile.next_v = page_rows(context_.v_cache, tile, page + 1);
  }
  const float log2_scale = tile.logit_scale * kLog2E;
  for (int64_t i = 0; i < num_blocks_; ++i) {
    kernel_->attend(block(i), page_tile, dim, log2_scale, scores_);
    page_tile.next_k = page_tile.next_v = nullptr;  // once is enough
    page_tile.page_bytes = 0;
  }
}

void TileWalker::walk(const QueryTile& tile, int64_t key_begin, int64_t key_end,
                      int64_t fetch_end) {
  const DualChunk& chunks = context_.dual_chunk;
  fetch_end_ = std::min(fetch_end, tile.last_token() + 1);
  start(tile);
  alignas(64) std::byte saved[kSavedStateBytes];
  if (kernel_->begin != nullptr) kernel_->begin(saved);

  const int64_t intra = chunks.intra_begin(tile.first_token);
  const int64_t successive = chunks.successive_begin(tile.first_token);
  const int64_t borders[] = {0, successive, intra, tile.last_token() + 1};
  for (int stage = 0; stage < 3; ++stage) {
    const int64_t begin = std::max(borders[stage], key_begin);
    const int64_t end = std::min(borders[stage + 1], key_end);
    if (begin >= end) continue;
    rotate_queries(tile, static_cast<Stage>(stage));
    for (int64_t page = begin / kPageSize; page * kPageSize < end; ++page) {
      visit_page(tile, page, begin, end);
    }
  }
  if (kernel_->end != nullptr) kernel_->end(saved);
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
