"""Planted errors of the sparse_prefill kernels; see mutants.py."""

# ruff: noqa: E501 (a pattern is a line of the source, whatever its length)
from __future__ import annotations

from emu.mutants import DEADLOCK, NUMBERS, RAW, ROWS, TILE90, WAR, WAW, Mutant

_OP = "ops/sparse_prefill/sparse_prefill_"
SM90, SM80, TILES, MASK, GATHER = (
    _OP + name for name in ("sm90.cuh", "sm80.cuh", "tiles.h", "mask.h", "gather.cuh")
)
UNINITIALISED = "uninitialised"


def _mutant(
    name: str, file: str, old: str, new: str, *detectors: str, **options: str | int | bool
) -> Mutant:
    kernel = "sm80" if file == SM80 else "sm90"
    return Mutant(
        f"sparse: {name}", file, old, new, frozenset(detectors),
        **({"kernel": kernel, "op": "sparse", "head_dim": 64} | options),
    )  # fmt: skip


SPARSE_MUTANTS = (
    # --- The producer of sm_90 -----------------------------------------------------------------
    _mutant("free values are not waited for", SM90,
            "      ring.wait_free(Q1M_SHARED_MEMBER(core, v_free));\n", "",
            WAR, WAW, DEADLOCK, "mbarrier-overarrive", "mbarrier-phase", every_push=True),
    _mutant("keys are announced before all lanes have written", SM90,
            "      arch::warp_sync();\n      if (leader) {  // only", "      if (leader) {  // only",
            RAW, UNINITIALISED),
    _mutant("too few bytes expected", SM90,
            "arch::mbarrier_arrive_expect_tx(k_full[ring.stage], Tile::kBlockBytes);",
            "arch::mbarrier_arrive_expect_tx(k_full[ring.stage], Tile::kBlockBytes / 2);",
            "mbarrier-phase", "mbarrier-bytes", RAW, WAR, DEADLOCK),
    _mutant("both pieces to one place", SM90, "static_cast<uint32_t>(index) * kPieceBytes", "0u",
            WAW, UNINITIALISED, NUMBERS, RAW),
    _mutant("one panel twice", SM90, "{{0, piece.row, panel,", "{{0, piece.row, 0,", NUMBERS, head_dim=128),
    _mutant("another head's verticals", SM90, "gathered ? tile.q_head : tile.kv_head", "tile.kv_head", NUMBERS),
    _mutant("keys for values", SM90, "gathered ? which : piece.page", "gathered ? 0 : piece.page", NUMBERS),
    _mutant("a block with pieces of two stages", SM90, "walk.next(piece, index == 0)", "walk.next(piece, true)",
            NUMBERS),
    _mutant("rows behind the call's tokens are not zeroed", SM90,
            "num_values == kKeys && piece.num_rows < kPieceKeys", "false", NUMBERS),
    # --- Two blocks that share their loads -----------------------------------------------------
    # At 128 dims the ring has three places and goes round. That the keys of a place are free follows
    # from its values, which are released later.
    _mutant("a place is free when one block has used its values", TILE90,
            "v_free)[i], kConsumerWarps * kCluster);", "v_free)[i], kConsumerWarps);",
            WAR, WAW, DEADLOCK, "mbarrier-overarrive", "mbarrier-phase", head_dim=128),
    _mutant("a place is released to the own block twice", TILE90,
            "arch::map_to_rank(free, static_cast<uint32_t>(lane))", "arch::map_to_rank(free, arch::cluster_rank())",
            WAR, WAW, DEADLOCK, "mbarrier-overarrive", "mbarrier-phase", head_dim=128, every_push=True),
    _mutant("a place is released to the first block only", TILE90, "if (lane < kCluster) {", "if (lane < 1) {", DEADLOCK),
    _mutant("multicast to the first block only", SM90, "(1 << kCluster) - 1;", "1;",
            DEADLOCK, "mbarrier-overarrive", "mbarrier-phase", "mbarrier-bytes", WAW, RAW),
    _mutant("multicast beyond the cluster", SM90, "(1 << kCluster) - 1;", "7;", "multicast"),
    _mutant("both blocks load the same piece", SM90, "index == rank)", "index == 0)",
            UNINITIALISED, NUMBERS, RAW, WAW, every_push=True),
    _mutant("each block loads both pieces", SM90, "index == rank)", "index >= 0)",
            WAW, RAW, WAR, DEADLOCK, "mbarrier-phase", "mbarrier-bytes"),
    _mutant("the other block's barriers may not be there yet", SM90, "    sync();\n    if (arch::warp_index() < 4) {",
            "    arch::block_sync();\n    if (arch::warp_index() < 4) {",
            "mbarrier-init-race", "mbarrier-invalid", "cluster-barrier"),
    _mutant("a block leaves while the other releases", SM90, "    if constexpr (kCluster > 1) sync();", "    if (false) sync();",
            "cluster-exit", every_push=True),
    _mutant("both blocks have the first one's rows", TILES, "  tile.row += before;\n", "", NUMBERS, "global-race"),
    _mutant("the second block's rows are a block too many", TILES, "  tile.num_tokens -= before;\n", "",
            NUMBERS, "global-bounds"),
    _mutant("the second block's rows begin too late", TILES, "  tile.first_row -= before;\n", "", NUMBERS),
    # --- The walk ------------------------------------------------------------------------------
    _mutant("a vertical inside of a run counts twice", TILES, "key < end && !covered(key, of[0], num_runs);",
            "key < end;", NUMBERS, every_push=True),
    _mutant("the dilated run is a key short", TILES, "return low < num_runs && run_at(low).begin < of.end - key;",
            "return low < num_runs && run_at(low).begin < of.end - key - 1;", NUMBERS),
    _mutant("runs are searched the wrong way", TILES, "        high = middle;", "        high = middle - 1;",
            NUMBERS, DEADLOCK),
    _mutant("a run begins one key late", TILES, "                                                        : of[group].begin - run.end + 1) -",
            "                                                        : of[group].begin - run.end + 2) -", NUMBERS),
    _mutant("a run goes over the stage's end", TILES, "min2(keys.end, of[group].end - run.begin) - first);",
            "of[group].end - run.begin - first);", NUMBERS),
    _mutant("a run's pieces on another grid", TILES, "first = begin & -kPieceKeys;", "first = begin & -32;", NUMBERS,
            "global-bounds", "tensor-map"),
    _mutant("both groups of rows have the first one's tile", TILES,
            "tile.first_token + group * kGroupRows;", "tile.first_token;", NUMBERS),
    _mutant("rows before the call's are computed", TILES,
            "first < p.q_begin ? p.q_begin - first : 0", "0", "global-bounds", "global-race", NUMBERS),
    _mutant("lists of the stage before", TILES, "    state.vertical = state.vertical_end;\n", "", NUMBERS),
    # --- Masks ---------------------------------------------------------------------------------
    _mutant("the other group's keys", MASK, "Q1M_SHARED_MEMBER(block, bits)[group];",
            "Q1M_SHARED_MEMBER(block, bits)[group ^ 1];", NUMBERS),
    _mutant("the second row has the first one's token", MASK, "if (first > token + 8 * h)", "if (first > token)",
            NUMBERS),
    _mutant("the later key has the earlier one's position", MASK, "if (second > token", "if (first > token", NUMBERS),
    _mutant("columns of another lane", MASK, "const int column = 2 * (arch::lane_index() % 4);",
            "const int column = arch::lane_index() % 4;", NUMBERS, "alignment"),
    _mutant("a row without keys", ROWS, "kEmptyRows && maximum == -INFINITY ? 0.0f : maximum",
            "false ? 0.0f : maximum", NUMBERS),
    _mutant("the sum of a row without keys", ROWS, "l[h] == 0 ? 0.0f : arch", "false ? 0.0f : arch", NUMBERS),
    # --- Gathering -----------------------------------------------------------------------------
    _mutant("rows behind the list are not zeroed", GATHER, "row >= count + kRows", "row >= count", NUMBERS,
            every_push=True),
    _mutant("a later token's values", GATHER, "row < count ? arch::global_load(p.verticals.at(head, row)) : tokens",
            "row < count ? arch::global_load(p.verticals.at(head, row)) - 1 : tokens", NUMBERS),
    _mutant("a head is left out", GATHER, "rank += count > mine ||", "rank += count >= mine ||", NUMBERS, "global-bounds"),
    # --- sm_80 ---------------------------------------------------------------------------------
    _mutant("sm_80: the piece at hand is overwritten", SM80,
            "find_piece(p, Tile::whole(aside), smem, place ^ 1, false)",
            "find_piece(p, Tile::whole(aside), smem, place, false)", WAR, RAW, WAW, UNINITIALISED, every_push=True),
    _mutant("sm_80: the walk is written while it is read", SM80,
            "    arch::warp_sync();  // all have read the state\n", "", WAR),
    _mutant("sm_80: rows without numbers are copied", SM80, "from + i * 8, row < rows);", "from + i * 8, true);", NUMBERS,
            "global-bounds"),
    _mutant("sm_80: queries are not rotated anew", SM80, "      if (facts.stage != stage) {", "      if (stage < 0) {", NUMBERS),
)  # fmt: skip
"""Run on tests/emu/sparse_driver.cpp."""
