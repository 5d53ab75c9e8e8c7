// The work list of the GPU kernels of prefill_attention (prefill_attention_tiles.h).
#include <map>
#include <tuple>
#include <vector>

#include "arch/emu/emulator.h"
#include "common/attention/query_tile.h"
#include "ops/prefill_attention/prefill_attention_tiles.h"
#include "test.h"

namespace qwen1m {
namespace {

const std::vector<DualChunk> kChunks = {{},          {256, 32},  {1024, 128}, {113, 13},
                                        {48, 8},     {2, 1},     {100, 70},   {262144, 8192},
                                        {2048, 512}, {640, 128}, {129, 1}};

Q1M_TEST(token_tiles_are_those_of_the_cpu_walk) {
  for (const DualChunk& chunks : kChunks) {
    for (const int64_t begin : {0, 1, 40, 127, 128, 223, 300, 1000}) {
      for (const int64_t length : {1, 2, 127, 128, 129, 224, 500, 1500}) {
        const TokenTiles tiles{begin, begin + length, chunks.chunk_len()};
        int64_t index = 0;
        for_each_tile(chunks, begin, begin + length, kTileTokens, [&](int64_t first, int64_t n) {
          const TokenTiles::Span span = tiles.at(index++);
          EXPECT_EQ(span.first, first);
          EXPECT_EQ(span.count, n);
        });
        EXPECT_EQ(tiles.count(), index);
      }
    }
  }
}

Q1M_TEST(tiles_far_out_do_not_overflow) {
  const int64_t n = int64_t{1} << 30;
  const TokenTiles plain{n - 1000, n, kInfiniteChunk};
  EXPECT_EQ(plain.count(), int64_t{8});
  EXPECT_EQ(plain.at(7).first, n - 1000 + 7 * 128);
  EXPECT_EQ(plain.at(7).count, int64_t{104});
  const TokenTiles qwen{0, 1010000, 262144 - 8192};
  EXPECT_EQ(qwen.count(), int64_t{3 * 1984 + (1010000 - 3 * 253952 + 127) / 128});
}

/// What the rules of dual_chunk.h say of a pair of tokens: 0 inter, 1 successive, 2 intra.
int stage_of(const DualChunk& chunks, int64_t query, int64_t key) {
  const int64_t distance = chunks.chunk(query) - chunks.chunk(key);
  return distance == 0 ? 2 : distance == 1 ? 1 : 0;
}

template <int kKeys>
void check_walk(const DualChunk& chunks, int64_t first, int64_t count) {
  const PrefillTile tile{.batch = 0,
                         .q_head = 0,
                         .kv_head = 0,
                         .first_token = static_cast<int32_t>(first),
                         .num_tokens = static_cast<int32_t>(count),
                         .row = 0};
  int64_t next_key = 0;
  for (KeyWalk<kKeys> walk(chunks, tile); !walk.done(); walk.next()) {
    EXPECT_EQ(int64_t{walk.page()}, int64_t{walk.first_key()} / kPageSize);
    for (int64_t key = walk.first_key(); key < walk.first_key() + kKeys; ++key) {
      if (key < walk.lo() || key >= walk.hi()) {
        EXPECT(walk.hides_keys(tile.last_token()));
        continue;
      }
      EXPECT_EQ(key, next_key);  // ascending, each key once
      ++next_key;
      EXPECT_EQ(walk.stage, stage_of(chunks, first, key));
      if (key > first) EXPECT(walk.hides_keys(tile.first_token));
    }
  }
  EXPECT_EQ(next_key, first + count);
}

Q1M_TEST(a_walk_meets_every_key_once_in_its_stage) {
  for (const DualChunk& chunks : kChunks) {
    for (const int64_t begin : {0, 1, 100, 128, 223, 450, 1000, 5000}) {
      for_each_tile(chunks, begin, begin + 300, kTileTokens, [&](int64_t first, int64_t count) {
        check_walk<128>(chunks, first, count);
        check_walk<64>(chunks, first, count);
      });
    }
  }
}

struct Batch {
  std::vector<int64_t> q_len, kv_len;
  int64_t q_heads, kv_heads, head_dim;
};

Q1M_TEST(blocks_cover_every_row_and_head_once) {
  const std::vector<Batch> batches = {{{300, 0, 1, 128}, {300, 77, 900, 129}, 6, 2, 64},
                                      {{1000}, {70000}, 8, 4, 128},   // sections of 1 KV head
                                      {{500}, {20000}, 21, 3, 128}};  // sections of 3 and of 1
  for (const Batch& batch : batches) {
    for (const DualChunk& chunks : {DualChunk{}, DualChunk{256, 32}, DualChunk{48, 8}}) {
      std::vector<int64_t> cu_q{0};
      for (const int64_t n : batch.q_len) cu_q.push_back(cu_q.back() + n);
      const auto count = static_cast<int64_t>(batch.q_len.size());
      std::vector<int64_t> kv_len = batch.kv_len;
      PrefillAttentionParams p;
      p.q.sizes = {cu_q.back(), batch.q_heads, batch.head_dim};
      p.k_cache.sizes = {1, batch.kv_heads, kPageSize, batch.head_dim};
      p.cu_q = {cu_q.data(), {count + 1}, {1}};
      p.kv_len = {kv_len.data(), {count}, {1}};
      p.dual_chunk = chunks;
      arch::emu::register_global(cu_q.data(), cu_q.size() * 8, "cu_q", false);
      arch::emu::register_global(kv_len.data(), kv_len.size() * 8, "kv_len", false);

      std::map<std::tuple<int64_t, int32_t>, int> covered;  // (row, head)
      int64_t block = 0;
      bool ended = false;
      const auto report = arch::emu::launch({.blocks = 1, .threads = 32}, [&] {
        if (arch::thread_index() != 0) return;
        PrefillTile tile;
        for (; block < max_tiles(p); ++block) {
          if (!find_tile(p, block, tile)) {
            ended = true;
            continue;
          }
          EXPECT(!ended);  // the blocks without work are the last ones
          EXPECT_EQ(tile.kv_head,
                    static_cast<int32_t>(tile.q_head / (batch.q_heads / batch.kv_heads)));
          const auto b = static_cast<size_t>(tile.batch);
          EXPECT_EQ(tile.first_token - (kv_len[b] - batch.q_len[b]), tile.row - cu_q[b]);
          EXPECT_EQ(chunks.chunk(tile.first_token), chunks.chunk(tile.last_token()));
          for (int64_t i = 0; i < tile.num_tokens; ++i) ++covered[{tile.row + i, tile.q_head}];
        }
        EXPECT(!find_tile(p, block, tile));
      });
      EXPECT(report.ok());
      EXPECT_EQ(static_cast<int64_t>(covered.size()), cu_q.back() * batch.q_heads);
      for (const auto& [where, times] : covered) EXPECT_EQ(times, 1);
      arch::emu::unregister_global(cu_q.data());
      arch::emu::unregister_global(kv_len.data());
    }
  }
}

}  // namespace
}  // namespace qwen1m
