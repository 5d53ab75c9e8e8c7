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


@dataclass(frozen=True)
class Mutant:
    """One error.

    Attributes:
        op: Whose kernel is broken, csrc/ops/<op>/<op>_kernel.cuh.
        name: What is wrong.
        old: Text that is replaced; it occurs once.
        new: What stands there instead.
        detectors: Any of these must fire.
        test: Function of tests/ops/test_<op>.py.
        case: Of the case list; None for tests without one.
    """

    op: str
    name: str
    old: str
    new: str
    detectors: frozenset[str]
    test: str = "test_matches_definition"
    case: str | None = "vectors_of_8"


def _mutant(
    op: str, name: str, old: str, new: str, *detectors: str, **options: str | None
) -> Mutant:
    return Mutant(op, name, old, new, frozenset(detectors), **options)  # type: ignore[arg-type]


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
    _mutant("qkv_rope_append", "values into the keys' cache", "to = p.args.v_cache.as<bf16>()",
            "to = p.args.k_cache.as<bf16>()", NUMBERS, "global-race", case="chunk_border"),
    _mutant("qkv_rope_append", "a skipped slot is slot 0", "return -1;", "return 0;", NUMBERS, "global-race",
            case="skipped_slots"),
    _mutant("qkv_rope_append", "a slot behind the cache is written", " || slot >= cache.size(0) * kPageSize", "",
            "global-bounds", test="test_values_that_a_gpu_cannot_refuse", case=None),
    _mutant("qkv_rope_append", "tokens that are not there", "      if (token >= p.args.q.size(0)) break;\n", "",
            "global-bounds", case="chunk_border"),
    _mutant("qkv_rope_append", "the next head of the cache is a row away", "at(int64_t{0}, head) + row;\n      arch::",
            "at(int64_t{0}, int64_t{0}, head) + row;\n      arch::", NUMBERS, "global-race", case="chunk_border"),
)  # fmt: skip
