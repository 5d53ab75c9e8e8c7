#pragma once
/// Which rows a GPU block of sparse_prefill works on, and the pieces of 64 keys that it loads for
/// them, derived from the head's run lists and verticals: a run is fixed in offset space, so one
/// list serves every tile, and each tile subtracts and clips. The same for every GPU kernel of the
/// op; tests/emu checks it against the definition in sparse_prefill.h.

#include "arch/arch.h"
#include "common/attention/prefill_tile.h"
#include "qwen1m/sparse_plan.h"
#include "qwen1m/sparse_prefill.h"

namespace qwen1m {

/// Keys of a piece: what one box of a copy brings, on the absolute grid for a run.
inline constexpr int kPieceKeys = 64;
/// Rows that share a set of keys in every case: tile_tokens is a multiple. A block has two such
/// groups.
inline constexpr int kGroupRows = 64;
inline constexpr int kGroups = static_cast<int>(kTileTokens) / kGroupRows;

/// Blocks of a call, or clusters of blocks, `rows` rows of a head each, on a grid that begins with
/// the segment: which rows share a block does not depend on the rows that a call asks for.
struct SparseTiles {
  int64_t first, count;  // block rows of the segment

  Q1M_HOST_DEVICE explicit SparseTiles(const SparsePrefillParams& p, int64_t rows = kTileTokens)
      : first((p.q_begin - p.segment_begin) / rows),
        count((p.q_begin + p.q.size(0) - p.segment_begin + rows - 1) / rows - first) {}
};

/// The order of the heads, those with the most keys first: rank to head, one entry in the last row
/// of each head's part of the scratch (sparse_prefill_gather.cuh writes it).
Q1M_HOST_DEVICE int32_t* head_of_rank(const SparsePrefillParams& p, int64_t rank) {
  return reinterpret_cast<int32_t*>(p.scratch.as<bf16>().at(0, rank, p.scratch.size(2) - 1));
}

/// The tile of block (or cluster) `block`: the head with the most keys first, and in it the latest
/// rows, whose runs are clipped least.
Q1M_DEVICE PrefillTile find_tile(const SparsePrefillParams& p, int64_t block,
                                 int64_t rows = kTileTokens) {
  const SparseTiles tiles(p, rows);
  const int64_t index = tiles.first + tiles.count - 1 - block % tiles.count;
  const int64_t first = p.segment_begin + index * rows;
  const int64_t last = first + rows, q_end = p.q_begin + p.q.size(0);
  const int32_t q_head = arch::global_load(head_of_rank(p, block / tiles.count));
  const auto group = static_cast<int32_t>(p.q.size(1) / p.k_cache.size(1));
  return {.batch = 0,
          .q_head = q_head,
          .kv_head = q_head / group,
          .first_token = static_cast<int32_t>(first),
          .num_tokens = static_cast<int32_t>((last < q_end ? last : q_end) - first),
          .row = first - p.q_begin,
          .first_row = static_cast<int32_t>(first < p.q_begin ? p.q_begin - first : 0)};
}

/// A cluster's tile, seen from row 128 rank on, where the rows of block `rank` begin. The call may
/// have none of them: then num_tokens is not positive.
Q1M_DEVICE PrefillTile tile_of_rank(PrefillTile tile, int32_t rank) {
  const int32_t before = rank * static_cast<int32_t>(kTileTokens);
  tile.first_token += before;
  tile.row += before;
  tile.first_row -= before;
  tile.num_tokens -= before;
  return tile;
}

/// 64 keys and who attends to them.
struct SparsePiece {
  uint64_t bits[kGroups];  // of each group of a block's rows: the keys that its tile attends to
  int32_t page;            // of the cache; -1: gathered verticals
  int32_t row;             // first row, of the page or of the head's verticals
  int32_t num_rows;        // that hold numbers; the others are past the call's tokens
  int32_t last_key;        // no later one counts
  int32_t position[2];     // of keys `lane` and `lane + 32`; lanes differ
};

/// Bits [lo, hi) of 64.
Q1M_HOST_DEVICE uint64_t range_bits(int32_t lo, int32_t hi) {
  const int32_t from = lo < 0 ? 0 : lo, to = hi > 64 ? 64 : hi;
  if (from >= to) return 0;
  return ~uint64_t{0} >> (64 - (to - from)) << from;
}

/// The pieces of a tile, stage after stage: the stage's verticals, then its runs in ascending
/// order. All lanes of a warp go through it together and know the same, but for `position`.
struct SparseWalk {
  struct State {
    int32_t stage;                   // -1 before the first, kStages behind the last
    int32_t vertical, vertical_end;  // rows of the head's list that are left in the stage
    int32_t run;                     // the last run that is left in the stage; -1: none
    int32_t key;                     // earlier ones are done
  };

  const SparsePrefillParams& p;
  const PrefillTile& tile;
  State state;

  Q1M_DEVICE SparseWalk(const SparsePrefillParams& params, const PrefillTile& of)
      : p(params), tile(of), state{-1, 0, 0, -1, 0} {}

  /// The next piece; false: the stage has no more, and if `any_stage`, neither have later ones, and
  /// state.stage is kStages. A piece of a stage that has no more has no bits. One call in a kernel:
  /// it is inlined.
  Q1M_DEVICE bool next(SparsePiece& piece, bool any_stage) {
    for (;;) {
      if (state.stage >= 0 && state.stage < kStages && (next_verticals(piece) || next_run(piece))) {
        return true;
      }
      if (!any_stage || !next_stage()) return false;
    }
  }

  /// For a tile without keys: its own first row, which nobody attends to.
  Q1M_DEVICE SparsePiece nothing() const {
    SparsePiece piece = {};
    at_token(tile.first_token + tile.first_row, piece);
    return piece;
  }

 private:
  struct Range {
    int32_t begin, end;
  };
  /// False: there is no other.
  Q1M_DEVICE bool next_stage() {
    if (state.stage == kStages || ++state.stage == kStages) return false;
    state.vertical = state.vertical_end;
    state.vertical_end += arch::global_load(p.vertical_count.at(tile.q_head, state.stage));
    state.run = arch::global_load(p.run_count.at(tile.q_head, state.stage)) - 1;
    state.key = 0;
    return true;
  }
  /// Keys of the stage, up to the last row of the block that the call has.
  Q1M_DEVICE Range keys() const {
    const auto intra = static_cast<int32_t>(p.dual_chunk.intra_begin(tile.first_token));
    const auto successive = static_cast<int32_t>(p.dual_chunk.successive_begin(tile.first_token));
    return state.stage == 0   ? Range{0, successive}
           : state.stage == 1 ? Range{successive, intra}
                              : Range{intra, tile.last_token() + 1};
  }
  /// The rows [t0, t1) of sparse_prefill.h that a group of rows belongs to.
  Q1M_DEVICE Range tile_of(int group) const {
    const auto begin = static_cast<int32_t>(p.segment_begin);
    const auto end = static_cast<int32_t>(p.segment_end);
    const auto tokens = static_cast<int32_t>(p.tile_tokens);
    const int32_t row = tile.first_token + group * kGroupRows;
    const int32_t t0 = begin + (row - begin) / tokens * tokens;
    return {t0, t0 + tokens < end ? t0 + tokens : end};
  }
  /// A run [lo, hi) of the stage.
  Q1M_DEVICE Range run_at(int32_t index) const {
    const auto both = arch::global_load(
        reinterpret_cast<const uint64_t*>(p.runs.at(tile.q_head, state.stage, index)));
    return {static_cast<int32_t>(both), static_cast<int32_t>(both >> 32)};
  }
  /// Whether a key lies in the dilated runs of a tile.
  Q1M_DEVICE bool covered(int32_t key, Range of, int32_t num_runs) const {
    int32_t low = 0, high = num_runs;  // of the first run with hi > t0 - key
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (run_at(middle).end > of.begin - key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low < num_runs && run_at(low).begin < of.end - key;
  }
  /// The piece of the grid that a token lies in.
  Q1M_DEVICE void at_token(int32_t token, SparsePiece& piece) const {
    const int32_t first = token & -kPieceKeys;
    const int32_t rows = tile.last_token() + 1 - first;
    piece.page = arch::global_load(p.block_table.at(0, first / kPageSize));
    piece.row = first % static_cast<int32_t>(kPageSize);
    piece.num_rows = rows < kPieceKeys ? rows : kPieceKeys;
    const int32_t lane = arch::lane_index();
    piece.position[0] = first + lane;
    piece.position[1] = first + lane + 32;
  }

  Q1M_DEVICE bool next_verticals(SparsePiece& piece) {
    const int32_t lane = arch::lane_index(), end = keys().end;
    const int32_t num_runs = arch::global_load(p.run_count.at(tile.q_head, state.stage));
    const Range of[kGroups] = {tile_of(0), tile_of(1)};
    while (state.vertical < state.vertical_end) {
      piece.row = state.vertical;
      state.vertical += kPieceKeys;
      uint32_t words[kGroups][2];
      Q1M_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int32_t index = piece.row + 32 * half + lane;
        const bool there = index < state.vertical_end;
        const int32_t key =
            there ? arch::global_load(p.verticals.at(tile.q_head, index)) : INT32_MAX;
        const bool counts = key < end && !covered(key, of[0], num_runs);
        words[0][half] = warp_bits(counts);
        words[1][half] = of[1].begin == of[0].begin
                             ? words[0][half]
                             : warp_bits(key < end && !covered(key, of[1], num_runs));
        piece.position[half] = key;
      }
      if ((words[0][0] | words[0][1] | words[1][0] | words[1][1]) == 0) continue;
      Q1M_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        piece.bits[group] = words[group][0] | uint64_t{words[group][1]} << 32;
      }
      piece.num_rows = kPieceKeys;
      piece.page = -1;
      const int32_t last = arch::shuffle(piece.position[1], 31);
      piece.last_key = last < end ? last : end - 1;
      return true;
    }
    return false;
  }

  Q1M_DEVICE bool next_run(SparsePiece& piece) {
    const Range keys = this->keys(), of[kGroups] = {tile_of(0), tile_of(1)};
    int32_t first = -1;  // key of the piece
    piece.bits[0] = piece.bits[1] = 0;
    for (int32_t index = state.run; index >= 0; --index) {
      const Range run = run_at(index);
      // What both groups of rows attend to, together.
      const int32_t begin = max3(keys.begin, state.key, of[0].begin - run.end + 1);
      const int32_t end = min2(keys.end, of[1].end - run.begin);
      if (begin >= end) {
        if (first < 0) state.run = index - 1;
        continue;
      }
      if (first < 0) first = begin & -kPieceKeys;
      if (begin >= first + kPieceKeys) break;
      Q1M_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        piece.bits[group] |= range_bits(
            (keys.begin > of[group].begin - run.end + 1 ? keys.begin
                                                        : of[group].begin - run.end + 1) -
                first,
            min2(keys.end, of[group].end - run.begin) - first);
      }
      if (end <= first + kPieceKeys) state.run = index - 1;
    }
    if (first < 0) return false;
    state.key = first + kPieceKeys;
    piece.last_key = min2(keys.end, state.key) - 1;
    at_token(first, piece);
    return true;
  }

  /// A bit of each lane.
  static Q1M_DEVICE uint32_t warp_bits(bool mine) {
    uint32_t bits = uint32_t{mine} << arch::lane_index();
    Q1M_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) bits |= arch::shuffle_xor(bits, lanes);
    return bits;
  }
  static Q1M_DEVICE int32_t min2(int32_t a, int32_t b) { return a < b ? a : b; }
  static Q1M_DEVICE int32_t max3(int32_t a, int32_t b, int32_t c) {
    const int32_t ab = a > b ? a : b;
    return ab > c ? ab : c;
  }
};

}  // namespace qwen1m
