"""Errors that people really make in elementwise kernels, one at a time.

Each is a substitution in a copy of a kernel; the op's own test, run with it, must fail: by a kind of
issue of the emulator (docs/emulator.md), or by "numbers" that differ from the definition. What the
emulator cannot see, a launch that starts before the one in front has ended, is read off the machine
code instead (ACQBULK in tests/cuda/kernels.json).
"""

# ruff: noqa: E501 (a pattern is a line of the source, whatever its length)
from __future__ import annotations

from dataclasses import dataclass

NUMBERS = "numbers"
DEADLOCK = "deadlock"


@dataclass(frozen=True)
class Mutant:
    """One error.

    Attributes:
        op: Whose kernel is broken.
        name: What is wrong.
        old: Text that is replaced; it occurs once.
        new: What stands there instead.
        detectors: Any of these must fire.
        test: Function of tests/ops/test_<op>.py.
        case: Of the case list; None for tests without one.
        file: Of csrc/ops/<op>/<op>_*.
        device: Whose kernel it is.
        every_push: Part of `make test`; the others run in `make soak`.
    """

    op: str
    name: str
    old: str
    new: str
    detectors: frozenset[str]
    test: str = "test_matches_definition"
    case: str | None = "vectors_of_8"
    file: str = "kernel.cuh"
    device: str = "emu_sm80"
    every_push: bool = True


def _mutant(
    op: str, name: str, old: str, new: str, *detectors: str, **options: str | bool | None
) -> Mutant:
    return Mutant(op, name, old, new, frozenset(detectors), **options)  # type: ignore[arg-type]


def _fp8(name: str, old: str, new: str, *detectors: str, every_push: bool = False) -> Mutant:
    return _mutant(
        "qkv_rope_append", f"fp8: {name}", old, new, *detectors, every_push=every_push,
        test="test_fp8_cache_holds_the_rounded_values", case="chunk_border",
    )  # fmt: skip


def _cluster(name: str, old: str, new: str, *detectors: str, every_push: bool = False) -> Mutant:
    return _mutant(
        "sample", f"cluster: {name}", old, new, *detectors, every_push=every_push,
        case="everything_of_many", device="emu_sm90",
    )  # fmt: skip


_RAW = "race-read-after-write"

MUTANTS = (
    # --- rms_norm ------------------------------------------------------------------------------
    _mutant("rms_norm", "no barrier before the warps' sums are read", "    arch::block_sync();\n", "",
            _RAW, "uninitialised", case="qwen_7b"),
    _mutant("rms_norm", "the sum of the first warp only", "lane < p.threads / 32 ?", "lane < 1 ?", NUMBERS, case="qwen_7b"),
    _mutant("rms_norm", "a step of the butterfly is missing", "int mask = 16;", "int mask = 8;", NUMBERS),
    _mutant("rms_norm", "the residual is not written", "          arch::global_store(vector_at(residual, at), row[i]);\n",
            "", NUMBERS),
    _mutant("rms_norm", "one vector too many", "static_cast<int>(p.x.size(1) / kVectorElems);",
            "static_cast<int>(p.x.size(1) / kVectorElems) + 1;", NUMBERS, "global-bounds", "global-race"),
    _mutant("rms_norm", "x through the read-only path", "row[i] = arch::global_load_coherent(vector_at(x, at));",
            "row[i] = arch::global_load(vector_at(x, at));", "global-read-only", test="test_out_may_be_x", case=None),
    _mutant("rms_norm", "eps inside of the mean", "/ hidden + p.args.eps", "/ (hidden + p.args.eps)", NUMBERS,
            case="eps_dominates"),
    _mutant("rms_norm", "fewer vectors than the widest row has", "kVectors = 4;", "kVectors = 2;", NUMBERS,
            "refused", case="widest_on_a_gpu"),
    # --- swiglu --------------------------------------------------------------------------------
    _mutant("swiglu", "gate and up are swapped", "silu(g[e]) * u[e]", "silu(u[e]) * g[e]", NUMBERS),
    _mutant("swiglu", "the sign of the exponent", "g * -1.44269504f", "g * 1.44269504f", NUMBERS),
    _mutant("swiglu", "the last piece of a row is missing", "(vectors + kPiece - 1) / kPiece)", "vectors / kPiece)",
            NUMBERS, case="qwen_7b"),
    _mutant("swiglu", "two blocks write one piece", "block % p.pieces)", "block % p.pieces / 2)", "global-race",
            NUMBERS, case="qwen_7b"),
    # --- embedding -----------------------------------------------------------------------------
    _mutant("embedding", "ids are not looked at", "const bool exists = id >= 0 && id < p.args.weight.size(0);",
            "const bool exists = true;", "global-bounds", test="test_an_id_outside_of_the_table", case=None),
    _mutant("embedding", "the stride is the width", "(exists ? id : 0) * p.args.weight.stride(0)",
            "(exists ? id : 0) * p.args.weight.size(1)", NUMBERS),
    # --- qkv_rope_append -----------------------------------------------------------------------
    _mutant("qkv_rope_append", "neighbouring vectors are a pair", "const int high = low + p.half_vectors;",
            "const int high = low + 1;", NUMBERS, case="chunk_border"),
    _mutant("qkv_rope_append", "keys at their absolute position", "position %= p.args.chunk_len;", "position += 0;",
            NUMBERS, case="chunk_border"),
    _mutant("qkv_rope_append", "the upper half has no bias", "      add_bias(b, p, bias_high);\n", "", NUMBERS,
            case="chunk_border"),
    _mutant("qkv_rope_append", "values into the keys' cache", "append(p.args.v_cache.", "append(p.args.k_cache.", NUMBERS, "global-race", case="chunk_border"),
    _mutant("qkv_rope_append", "a skipped slot is slot 0", "return -1;", "return 0;", NUMBERS, "global-race",
            case="skipped_slots"),
    _mutant("qkv_rope_append", "a slot behind the cache is written", " || slot >= cache.size(0) * kPageSize", "",
            "global-bounds", test="test_values_that_a_gpu_cannot_refuse", case=None),
    _mutant("qkv_rope_append", "tokens that are not there", "      if (token >= p.args.q.size(0)) break;\n", "",
            "global-bounds", case="chunk_border"),
    _mutant("qkv_rope_append", "the next head of the cache is a row away", "at(int64_t{0}, head) + row;\n",
            "at(int64_t{0}, int64_t{0}, head) + row;\n", NUMBERS, "global-race", case="chunk_border"),
    _fp8("not divided by the scale", "values[2 * i] / scale, values[2 * i + 1] / scale",
         "values[2 * i], values[2 * i + 1]", NUMBERS),
    _fp8("keys with the scales of values", "load_scale(p.args.k_scale, head)", "load_scale(p.args.v_scale, head)",
         NUMBERS, every_push=True),
    _fp8("the scale of the first head for all", "scale.at(kv_head)", "scale.at(0)", NUMBERS),
    _fp8("pairs in the wrong order", "pairs[0] | pairs[1] << 16", "pairs[1] | pairs[0] << 16", NUMBERS),
    _fp8("vectors twice as wide", "reinterpret_cast<uint64_t*>(head) + in_head",
         "reinterpret_cast<uint64_t*>(head) + 2 * in_head", NUMBERS, "global-race", "global-bounds"),
    # --- widen_pages ---------------------------------------------------------------------------
    _mutant("widen_pages", "a NaN becomes 480", "magnitude == 0x7f ? arch::as_float(0x7fc00000) : small", "small", NUMBERS),
    _mutant("widen_pages", "signs are lost", "(code & 0x80) << 24 | ", "", NUMBERS, every_push=False),
    _mutant("widen_pages", "the scale of the first head for all", "args.scale.at(head)", "args.scale.at(0)", NUMBERS, every_push=False),
    _mutant("widen_pages", "the last piece of a page is missing", "(vectors + kPiece - 1) / kPiece)", "vectors / kPiece)",
            NUMBERS, case="head_dim_80", every_push=False),
    _mutant("widen_pages", "no end of a page", "      if (at < p.vectors) arch::global_store", "      arch::global_store",
            NUMBERS, "global-race", "global-bounds", every_push=False),
    _mutant("widen_pages", "a page that is not there", "    if (page < 0 || page >= args.codes.size(0)) return;\n", "",
            "global-bounds", test="test_a_page_outside_of_the_cache", case=None),
    _mutant("widen_pages", "the n-th page instead of the page of that number", "wide.as<bf16>().at(page, head)",
            "wide.as<bf16>().at(row / heads, head)", NUMBERS, every_push=False),
    # --- sample --------------------------------------------------------------------------------
    _mutant("sample", "no barrier before partial results are read",
            "      arch::block_sync();\n      return arch::lane_index() < kWarps",
            "      return arch::lane_index() < kWarps", _RAW, "uninitialised", case="plain"),
    _mutant("sample", "partial results are written while they are read", "      turn ^= 1;", "      turn ^= 0;",
            "race-write-after-read", case="everything"),
    _mutant("sample", "no barrier before the token is read",
            "        arch::block_sync();\n        return arch::shared_load(picked);",
            "        return arch::shared_load(picked);", _RAW, "uninitialised",
            case="plain"),
    _mutant("sample", "the history through the read-only path", "arch::global_load_coherent(vector_at(history_at(first), half))",
            "arch::global_load(vector_at(history_at(first), half))", "global-read-only", case="everything"),
    _mutant("sample", "all threads count the token", "    if (writes) {\n      arch::global_store(p.args.token_ids",
            "    {\n      arch::global_store(p.args.token_ids", "global-race", case="everything"),
    _mutant("sample", "the end of the row is missing", "id < vocab(); ++id", "id + 1 < vocab(); ++id", NUMBERS, case="plain"),
    _mutant("sample", "a NaN is a logit like others", "logit == logit ?", "true ?", NUMBERS,
            test="test_rows_without_a_token", case=None),
    _mutant("sample", "the warp's own prefix", "shuffle_from(through - of_warp, warp)", "shuffle_from(through, warp)",
            NUMBERS, "uninitialised", case="qwen_defaults"),
    _mutant("sample", "one token too many of the top k", "here.count >= s.top_k)", "here.count > s.top_k)", NUMBERS,
            case="flat_few_of_many", file="rule.h"),
    _mutant("sample", "top_k is not looked at", "bool accepted = above.count < s.top_k;", "bool accepted = true;",
            NUMBERS, case="top_k", file="rule.h"),
    _mutant("sample", "top_p of more than the top k", "const bool exact =", "const bool exact = true ||", NUMBERS,
            case="flat_few_of_many", file="rule.h"),
    _mutant("sample", "the random number is used twice", "s.position, number), range)", "s.position, 0), range)",
            NUMBERS, DEADLOCK, case="top_k", file="rule.h"),
    _mutant("sample", "higher ids first among equals", "(0xfffffffeu - static_cast<uint32_t>(id))", "static_cast<uint32_t>(id + 1)",
            NUMBERS, "global-bounds", test="test_ties", case=None, file="rule.h"),
    _cluster("a block ends while another reads it", "    if constexpr (kBlocks > 1) Row::cluster_sync();  // no block", "    // no block",
             "cluster-exit"),
    _cluster("no barrier before another block's result is read",
             "arch::shared_store(place, of_block);\n      cluster_sync();", "arch::shared_store(place, of_block);\n      arch::block_sync();",
             _RAW, "uninitialised", "race-write-after-read", every_push=True),
    _cluster("blocks' results are written while they are read", "block_turn ^= 1;", "block_turn ^= 0;", "race-write-after-read"),
    _cluster("no barrier before other blocks' weights are read", "arch::shared_store(place, part);\n        cluster_sync();",
             "arch::shared_store(place, part);\n        arch::block_sync();", _RAW, "uninitialised", "race-write-after-read"),
    _cluster("no barrier before the token is read", "      if constexpr (kBlocks > 1) {\n        cluster_sync();\n        const",
             "      if constexpr (kBlocks > 1) {\n        arch::block_sync();\n        const", _RAW, "uninitialised",
             "race-write-after-read"),
    _cluster("the first block picks", "if (by == arch::cluster_rank()) pick_own", "if (arch::cluster_rank() == 0) pick_own",
             NUMBERS, "uninitialised", DEADLOCK),
    _cluster("weights of the blocks before are not taken off", "          left -= parts[rank];\n", "", NUMBERS, "uninitialised", DEADLOCK),
    _cluster("each block has the whole row", "      const int end = run + of_block;", "      const int end = whole + 1;", NUMBERS,
             "uninitialised", DEADLOCK),
    _cluster("every block writes the token", "arch::thread_index() == 0 && arch::cluster_rank() == 0", "arch::thread_index() == 0",
             "global-race"),
)  # fmt: skip
