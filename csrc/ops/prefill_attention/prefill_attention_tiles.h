#pragma once
/// Which part of a prefill a GPU block works on, and which keys it visits in which order. Plain
/// integer code, the same for every GPU kernel of the op; tests/cpp checks it against the walk of
/// the CPU backend.

#include "arch/arch.h"
#include "common/attention/prefill_tile.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/prefill_attention.h"

namespace qwen1m {

/// Blocks that run at the same time should walk the same keys: as many KV heads are worked on
/// together as have their keys and values in this part of the L2 cache (50 MB on H100 and H200, and
/// outputs and queries pass through it too); a longer context takes one KV head after the other.
inline constexpr int64_t kL2Bytes = 32 << 20;

/// The tiles of the query tokens [begin, end) of a sequence: from `begin` and from each DCA border
/// on, one every 128 tokens, so that no tile lies in two chunks.
struct TokenTiles {
  int64_t begin, end, chunk_len;

  Q1M_HOST_DEVICE static int64_t tiles_of(int64_t tokens) {
    return (tokens + kTileTokens - 1) / kTileTokens;
  }
  /// First border behind `begin`, or the end.
  Q1M_HOST_DEVICE int64_t border() const {
    const int64_t next = (begin / chunk_len + 1) * chunk_len;
    return next < end ? next : end;
  }
  Q1M_HOST_DEVICE int64_t count() const {
    const int64_t rest = end - border();
    return tiles_of(border() - begin) + rest / chunk_len * tiles_of(chunk_len) +
           tiles_of(rest % chunk_len);
  }
  struct Span {
    int64_t first, count;  // tokens
  };
  /// Tile `index` in ascending order, 0 <= index < count().
  Q1M_HOST_DEVICE Span at(int64_t index) const {
    const int64_t before = tiles_of(border() - begin);
    int64_t first = begin + index * kTileTokens, limit = border();
    if (index >= before) {
      const int64_t per_chunk = tiles_of(chunk_len), chunk = (index - before) / per_chunk;
      const int64_t chunk_begin = border() + chunk * chunk_len;
      first = chunk_begin + (index - before) % per_chunk * kTileTokens;
      limit = chunk_len < end - chunk_begin ? chunk_begin + chunk_len : end;
    }
    return {first, kTileTokens < limit - first ? kTileTokens : limit - first};
  }
};

/// Blocks to launch: never fewer than there are tiles. The lengths are on the device; the host
/// knows only how many rows there are, and that a sequence of n rows meets at most n / chunk_len +
/// 1 borders, each of which can add one tile.
inline int64_t max_tiles(const PrefillAttentionParams& p) {
  const int64_t rows = p.q.size(0), batch = p.kv_len.size(0);
  return (rows / kTileTokens + rows / p.dual_chunk.chunk_len() + 2 * batch) * p.q.size(1);
}

/// The tile of block `block`; false if there are fewer tiles than blocks. Sequence after sequence;
/// of a sequence as many KV heads together as fit the L2 cache; in these the latest tokens first,
/// which have the most keys (longest first balances the load); of a tile the query heads of each KV
/// head side by side, so that they read the same pages at the same time.
Q1M_DEVICE bool find_tile(const PrefillAttentionParams& p, int64_t block, PrefillTile& tile) {
  const int64_t q_heads = p.q.size(1), kv_heads = p.k_cache.size(1), group = q_heads / kv_heads;
  const int64_t head_bytes_per_token = 4 * p.k_cache.size(3);  // K and V, bf16
  const int64_t batch = p.kv_len.size(0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first_row = arch::global_load(p.cu_q.at(b));
    const int64_t rows = arch::global_load(p.cu_q.at(b + 1)) - first_row;
    const int64_t kv_len = arch::global_load(p.kv_len.at(b));
    const TokenTiles tiles{kv_len - rows, kv_len, p.dual_chunk.chunk_len()};
    const int64_t count = rows > 0 ? tiles.count() : 0;
    if (block >= count * q_heads) {
      block -= count * q_heads;
      continue;
    }
    int64_t together = kL2Bytes / (head_bytes_per_token * kv_len);
    together = together < 1 ? 1 : together > kv_heads ? kv_heads : together;
    const int64_t section_blocks = together * group * count;
    const int64_t section = block / section_blocks, within = block % section_blocks;
    const int64_t first_kv_head = section * together;
    const int64_t heads =
        (kv_heads - first_kv_head < together ? kv_heads - first_kv_head : together) * group;
    const TokenTiles::Span span = tiles.at(count - 1 - within / heads);
    const int64_t q_head = first_kv_head * group + within % heads;
    tile = {.batch = static_cast<int32_t>(b),
            .q_head = static_cast<int32_t>(q_head),
            .kv_head = static_cast<int32_t>(q_head / group),
            .first_token = static_cast<int32_t>(span.first),
            .num_tokens = static_cast<int32_t>(span.count),
            .row = first_row + span.first - tiles.begin};
    return true;
  }
  return false;
}

/// The keys of a tile in ascending order: the inter range, the successive one, the intra one, each
/// in blocks of kKeys on the absolute grid (never across a page). A block that holds a border is
/// visited in both ranges. The first visit holds key 0, which every query may see.
template <int kKeys>
struct KeyWalk {
  static_assert(kPageSize % kKeys == 0);
  int32_t successive_begin, intra_begin, end;  // tokens
  int32_t stage;                               // 0 inter, 1 successive, 2 intra, 3 over
  int32_t block;                               // tokens [kKeys block, kKeys block + kKeys)

  Q1M_HOST_DEVICE KeyWalk(const DualChunk& chunks, const PrefillTile& tile)
      : successive_begin(static_cast<int32_t>(chunks.successive_begin(tile.first_token))),
        intra_begin(static_cast<int32_t>(chunks.intra_begin(tile.first_token))),
        end(tile.last_token() + 1),
        stage(0),
        block(0) {
    skip_empty_ranges();
  }
  Q1M_HOST_DEVICE bool done() const { return stage == 3; }
  /// The keys of the range, [lo, hi).
  Q1M_HOST_DEVICE int32_t lo() const {
    return stage == 0 ? 0 : stage == 1 ? successive_begin : intra_begin;
  }
  Q1M_HOST_DEVICE int32_t hi() const {
    return stage == 0 ? successive_begin : stage == 1 ? intra_begin : end;
  }
  Q1M_HOST_DEVICE int32_t first_key() const { return block * kKeys; }
  Q1M_HOST_DEVICE int32_t page() const { return block / static_cast<int32_t>(kPageSize / kKeys); }
  Q1M_HOST_DEVICE void next() {
    ++block;
    if (first_key() >= hi()) {
      ++stage;
      skip_empty_ranges();
    }
  }
  /// Whether a query of `token` may not see some key of the block: outside of the range, or later.
  Q1M_HOST_DEVICE bool hides_keys(int32_t token) const {
    const int32_t last = first_key() + kKeys - 1;
    return first_key() < lo() || last >= hi() || last > token;
  }

 private:
  Q1M_HOST_DEVICE void skip_empty_ranges() {
    while (stage < 3 && lo() >= hi()) ++stage;
    if (stage < 3) block = lo() / kKeys;
  }
};

}  // namespace qwen1m
