"""Errors that people really make in kernels like these, one at a time.

A mutant is a substitution in a copy of the sources. It must apply exactly `count` times and compile; then
one of the named detectors must fire: the kind of an issue of the emulator (docs/emulator.md), or
"numbers" for outputs that differ from the float64 definition. A detector set without "numbers" is an
error whose outputs may well be right: only a checker sees it.
"""

# ruff: noqa: E501 (a pattern is a line of the source, whatever its length)
from __future__ import annotations

from dataclasses import dataclass

_OP = "ops/prefill_attention/prefill_attention_"
SM90, SM80, MASK, TILES = (_OP + name for name in ("sm90.cuh", "sm80.cuh", "mask.h", "tiles.h"))
_COMMON = "common/attention/"
TILE90, TILE80, ROWS, TILE, LAUNCH = (
    _COMMON + name
    for name in (
        "tile_sm90.cuh",
        "tile_sm80.cuh",
        "tile_rows.h",
        "prefill_tile.h",
        "attention_gpu.h",
    )
)
RING = "arch/ring.h"

NUMBERS = "numbers"
DEADLOCK = "deadlock"


@dataclass(frozen=True)
class Mutant:
    """One error.

    Attributes:
        name: What is wrong.
        file: Source below csrc.
        old: Text that is replaced.
        new: What stands there instead.
        detectors: Any of these must fire.
        kernel: Which kernel runs, "sm90" or "sm80".
        head_dim: 128 or 64.
        every_push: Part of `make test`; the others run in `make soak`.
        count: How often `old` occurs.
        op: Whose kernel it is, "prefill", "decode" or "sparse": the driver that runs it.
        fp8: With a cache in fp8 ("decode").
    """

    name: str
    file: str
    old: str
    new: str
    detectors: frozenset[str]
    kernel: str = "sm90"
    head_dim: int = 128
    every_push: bool = False
    count: int = 1
    op: str = "prefill"
    fp8: bool = False


def _mutant(
    name: str, file: str, old: str, new: str, *detectors: str, **options: str | int | bool
) -> Mutant:
    kernel = "sm80" if file in (SM80, TILE80) else "sm90"
    return Mutant(name, file, old, new, frozenset(detectors), **({"kernel": kernel} | options))


RAW, WAR, WAW = "race-read-after-write", "race-write-after-read", "race-write-after-write"

MUTANTS = (
    # --- mbarriers -----------------------------------------------------------------------------
    _mutant("consumer waits for the wrong parity", RING,
            "mbarrier_wait(full[stage], round Q1M", "mbarrier_wait(full[stage], round ^ 1 Q1M",
            DEADLOCK, RAW, WAR, every_push=True),
    _mutant("producer waits for the wrong parity", RING,
            "mbarrier_wait(free[stage], round ^ 1", "mbarrier_wait(free[stage], round",
            DEADLOCK, every_push=True),
    _mutant("the ring's parity never flips", RING, "round ^= 1;", "round ^= 0;",
            DEADLOCK, RAW, WAR, WAW, "mbarrier-overarrive"),
    _mutant("keys are never released", TILE90,
            "      arch::wgmma_wait<1>(s);\n"
            "      release(k_free[k_ring.stage]);\n",
            "      arch::wgmma_wait<1>(s);\n", DEADLOCK),
    _mutant("values are never released", TILE90,
            "      release(v_free[v_ring.stage]);\n", "", DEADLOCK),
    _mutant("all lanes release", TILE90, "if (lane == 0) arch::mbarrier_arrive(free);",
            "arch::mbarrier_arrive(free);", "mbarrier-overarrive", DEADLOCK, WAR),
    _mutant("free barriers count too few warps", TILE90, "constexpr int kConsumerWarps = kConsumerThreads / 32;",
            "constexpr int kConsumerWarps = 2;", "mbarrier-overarrive", WAR, DEADLOCK),
    _mutant("the first keys are released before they are read", TILE90,
            "    arch::wgmma_wait<0>(s);\n"
            "    release(k_free[k_ring.stage]);\n",
            "    release(k_free[k_ring.stage]);\n"
            "    arch::wgmma_wait<0>(s);\n", WAR, RAW),
    _mutant("values are released before they are read", TILE90,
            "      arch::wgmma_wait<0>(o, probabilities);\n"
            "      release(v_free[v_ring.stage]);\n",
            "      release(v_free[v_ring.stage]);\n"
            "      arch::wgmma_wait<0>(o, probabilities);\n", WAR, every_push=True),
    _mutant("producer does not wait for free keys", SM90,
            "      ring.wait_free(Q1M_SHARED_MEMBER(smem, k_free));\n", "",
            "mbarrier-overarrive", "mbarrier-phase", WAR, WAW, DEADLOCK, every_push=True),
    _mutant("producer does not wait for free values", SM90,
            "      ring.wait_free(Q1M_SHARED_MEMBER(smem, v_free));\n", "",
            "mbarrier-overarrive", "mbarrier-phase", WAR, WAW, DEADLOCK),
    _mutant("consumer does not wait for keys", SM90,
            "      ring.wait_full(k_full);\n", "", RAW, "uninitialised", "mbarrier-overarrive", WAR),
    _mutant("consumer does not wait for values", TILE90,
            "      v_ring.wait_full(v_full);\n      multiply_pv",
            "      multiply_pv", RAW, "uninitialised", WAR),
    _mutant("too few bytes expected", SM90, "mbarrier_arrive_expect_tx(full, Tile::kBlockBytes)",
            "mbarrier_arrive_expect_tx(full, Tile::kBlockBytes / 2)", "mbarrier-phase", "mbarrier-bytes", RAW, WAR, DEADLOCK,
            every_push=True),
    _mutant("too many bytes expected", SM90, "mbarrier_arrive_expect_tx(full, Tile::kBlockBytes)",
            "mbarrier_arrive_expect_tx(full, Tile::kBlockBytes + 128)", DEADLOCK, "mbarrier-bytes"),
    _mutant("a page of values is not loaded", SM90,
            "      load_page(p.v_map, Q1M_SHARED_MEMBER(smem, v)[ring.stage],\n"
            "                Q1M_SHARED_MEMBER(smem, v_full)[ring.stage], tile.kv_head, current);\n",
            "", DEADLOCK, RAW),
    _mutant("no fence after the inits", TILE90, "    arch::fence_mbarrier_init();\n", "",
            "proxy-fence", every_push=True),
    _mutant("nobody waits for the inits", SM90, "    arch::block_sync();\n    if (arch::warp_index() < 4)",
            "    if (arch::warp_index() < 4)", "mbarrier-init-race", "mbarrier-invalid"),
    # --- wgmma ---------------------------------------------------------------------------------
    _mutant("scores are read while they are computed", TILE90, "      arch::wgmma_wait<1>(s);\n",
            "", "wgmma-accumulator", WAR, every_push=True),
    _mutant("the wait for scores is too weak", TILE90, "arch::wgmma_wait<1>(s)",
            "arch::wgmma_wait<2>(s)", "wgmma-accumulator", "wgmma-wait-list", WAR),
    _mutant("the output is rescaled while it is computed", TILE90,
            "      softmax.rescale(o);\n", "", NUMBERS),
    _mutant("the output is rescaled before its wait", TILE90,
            "      softmax.template step<Keys::kEmptyRows>(s, scale_log2);\n      arch::wgmma_wait<0>(o, probabilities);\n",
            "      softmax.template step<Keys::kEmptyRows>(s, scale_log2);\n      softmax.rescale(o);\n"
            "      arch::wgmma_wait<0>(o, probabilities);\n", "wgmma-accumulator"),
    _mutant("the last output is not waited for", TILE90,
            "    arch::wgmma_wait<0>(o, probabilities);\n\n    softmax.finish", "    softmax.finish",
            "wgmma-accumulator", "exit-in-flight"),
    _mutant("probabilities are packed while they are read", TILE90,
            "      softmax.template step<Keys::kEmptyRows>(s, scale_log2);\n      arch::wgmma_wait<0>(o, probabilities);\n",
            "      softmax.template step<Keys::kEmptyRows>(s, scale_log2);\n      pack_probabilities<kKeys>(probabilities, s);\n"
            "      arch::wgmma_wait<0>(o, probabilities);\n", "wgmma-a-registers", every_push=True),
    _mutant("no wgmma fence before scores", TILE90, "    arch::wgmma_fence(s);\n", "", "wgmma-fence",
            every_push=True),
    _mutant("no wgmma fence before outputs", TILE90, "    arch::wgmma_fence(o, p);\n", "", "wgmma-fence"),
    _mutant("probabilities are not listed in the fence", TILE90, "arch::wgmma_fence(o, p);",
            "arch::wgmma_fence(o);", "wgmma-fence"),
    _mutant("a probability is written after the fence", TILE90, "    arch::wgmma_fence(o, p);\n",
            "    arch::wgmma_fence(o, p);\n    p[3][1] ^= 0x10001;\n", "wgmma-fence"),
    _mutant("scores are never committed", TILE90,
            "          arch::matrix_descriptor(k + offset, 16, 1024, arch::Swizzle::k128), step > 0);\n"
            "    }\n    arch::wgmma_commit();\n",
            "          arch::matrix_descriptor(k + offset, 16, 1024, arch::Swizzle::k128), step > 0);\n"
            "    }\n", "wgmma-accumulator", WAR, RAW),
    _mutant("outputs are never committed", TILE90,
            "kPanelBytes, 1024, arch::Swizzle::k128), true);\n    }\n    arch::wgmma_commit();\n",
            "kPanelBytes, 1024, arch::Swizzle::k128), true);\n    }\n",
            "wgmma-accumulator", "exit-in-flight", WAR),
    _mutant("keys with the wrong stride", TILE90, "matrix_descriptor(k + offset, 16, 1024",
            "matrix_descriptor(k + offset, 16, 512", NUMBERS, every_push=True),
    _mutant("values with the wrong leading stride", TILE90, "v + step * 2048, kPanelBytes, 1024",
            "v + step * 2048, 16, 1024", NUMBERS),
    _mutant("values with swapped strides", TILE90, "v + step * 2048, kPanelBytes, 1024",
            "v + step * 2048, 1024, kPanelBytes", NUMBERS, "shared-bounds", RAW),
    _mutant("values with a 64-byte swizzle", TILE90,
            "v + step * 2048, kPanelBytes, 1024, arch::Swizzle::k128",
            "v + step * 2048, kPanelBytes, 1024, arch::Swizzle::k64", NUMBERS, "shared-bounds",
            "wgmma-descriptor", RAW),
    _mutant("values as K-major", TILE90, "arch::wgmma_rs<D, arch::Major::kMN>",
            "arch::wgmma_rs<D, arch::Major::kK>", NUMBERS, "shared-bounds", RAW),
    _mutant("pages arrive without a swizzle", LAUNCH, "arch::Swizzle::k128", "arch::Swizzle::kNone",
            NUMBERS, "tensor-map"),
    # --- Proxies and thread barriers -----------------------------------------------------------
    _mutant("no proxy fence after the queries are written", TILE90,
            "                   arch::thread_index() % 128, 128);\n    arch::fence_proxy_async();\n",
            "                   arch::thread_index() % 128, 128);\n", "proxy-fence", every_push=True),
    _mutant("no proxy fence after the tail is zeroed", TILE90,
            "arch::Vec16{});\n    }\n    arch::fence_proxy_async();\n", "arch::Vec16{});\n    }\n",
            "proxy-fence"),
    _mutant("no barrier after the tail is zeroed", TILE90,
            "    arch::named_barrier_sync<kConsumers>(kConsumerThreads);\n", "", RAW, "proxy-fence"),
    _mutant("queries are multiplied before all of the warpgroup has written them", TILE90,
            "keys.stage(), group);\n    take_turn(group);\n", "keys.stage(), group);\n",
            RAW, "uninitialised", "named-barrier"),
    _mutant("a turn is lost", TILE90, "    if (group == 1) pass_turn(1);  // warpgroup 0 begins\n", "",
            DEADLOCK, every_push=True),
    _mutant("the two warpgroups count a barrier differently", TILE90,
            "      arch::named_barrier_arrive<kTurn1>(kConsumerThreads);",
            "      arch::named_barrier_arrive<kTurn1>(128);", "named-barrier", DEADLOCK),
    _mutant("output goes through the other warpgroup's queries", TILE90,
            "store(p, tile, {Q1M_SHARED_MEMBER(smem, q)}, warp * 16, o);",
            "store(p, tile, {Q1M_SHARED_MEMBER(smem, q)}, (warp ^ 4) * 16, o);",
            WAR, NUMBERS),
    _mutant("no warp barrier before the output rows are read", TILE90,
            "    arch::warp_sync();\n    store_rows", "    store_rows", RAW),
    _mutant("output without the swizzle", TILE90, "arch::stmatrix_x4(rows.at(first_row + lane % 16, j + lane / 16)",
            "arch::stmatrix_x4(rows.at(first_row + lane % 16, (j + lane / 16) ^ 1)", NUMBERS),
    _mutant("a shuffle without all lanes", ROWS, "      l[h] += arch::shuffle_xor(l[h], 1);\n",
            "      if (arch::lane_index() < 31) l[h] += arch::shuffle_xor(l[h], 1);\n",
            "divergence", DEADLOCK),
    _mutant("more registers than the block has", TILE90, "(3 * 168 - kProducerRegisters) / 2", "240",
            DEADLOCK),
    # --- Memory --------------------------------------------------------------------------------
    _mutant("lse of rows that are not there", ROWS, " && tile.has_row(row + 8 * h)) {", ") {",
            "global-bounds", "global-race", NUMBERS),
    _mutant("output of rows that are not there", ROWS, "    if (!tile.has_row(row)) continue;\n", "",
            "global-bounds", "global-race", NUMBERS),
    _mutant("two blocks work on one head", TILES,
            "const int64_t q_head = first_kv_head * group + within % heads;",
            "const int64_t q_head = first_kv_head * group + (within % heads) / 2 * 2;",
            "global-race", NUMBERS),
    _mutant("causal mask off by one", MASK, "const int end = token + 8 * h + 1;",
            "const int end = token + 8 * h + 2;", NUMBERS, every_push=True),
    _mutant("the range's first key is masked", MASK, "if (8 * j + e < lo ||", "if (8 * j + e <= lo ||", NUMBERS),
    _mutant("the range's border is not masked below", MASK, "if (8 * j + e < lo ||", "if (", NUMBERS),
    _mutant("the range's border is not masked above", MASK, "(end < walk.hi() ? end : walk.hi())",
            "(end)", NUMBERS),
    _mutant("masked blocks are not recognised", TILES, "last >= hi() || last > token", "last > token + 64",
            NUMBERS),
    _mutant("queries are not rotated anew at a border", TILE90,
            "      if (keys.stage() != stage) load_queries(p, tile, smem, keys.stage(), group);\n", "",
            NUMBERS, every_push=True),
    _mutant("ranges in the wrong order of positions", TILE, "return stage == 0   ? chunks.inter_position()",
            "return stage == 1   ? chunks.inter_position()", NUMBERS),
    _mutant("successive and intra swapped", TILE, ": stage == 1 ? chunks.successive_position(token)",
            ": stage == 2 ? chunks.successive_position(token)", NUMBERS),
    _mutant("the tail of the last page is not zeroed", TILE90,
            "    if (num_values < kKeys) zero_tail", "    if (num_values < 0) zero_tail", NUMBERS),
    _mutant("the tail is zeroed in the last visit only", TILE90,
            "      if (num_values < kKeys) {  // the", "      if (num_values < 0) {  // the", NUMBERS),
    _mutant("the maximum of one lane only", ROWS, "      maximum = fmaxf(maximum, arch::shuffle_xor(maximum, 2));\n",
            "", NUMBERS),
    _mutant("the sum is not rescaled", ROWS, "l[h] = l[h] * alpha[h] + sum;", "l[h] = l[h] + sum;", NUMBERS),
    _mutant("the other row's factor", ROWS, "o[i] *= alpha[(i >> 1) & 1];", "o[i] *= alpha[i & 1];", NUMBERS),
    # --- sm_80 ---------------------------------------------------------------------------------
    _mutant("sm_80: keys are not waited for", SM80,
            "      arch::cp_async_wait<0>();\n      arch::block_sync();  // keys",
            "      arch::block_sync();  // keys", RAW, "uninitialised", every_push=True),
    _mutant("sm_80: values are not waited for", SM80,
            "      arch::cp_async_wait<0>();\n      arch::block_sync();  // values",
            "      arch::block_sync();  // values", RAW, "uninitialised"),
    _mutant("sm_80: no barrier in front of the keys' use", SM80,
            "      arch::block_sync();  // keys are here; the values of the block before are done with\n",
            "", RAW, WAR, every_push=True),
    _mutant("sm_80: no barrier in front of the values' use", SM80,
            "      arch::block_sync();  // values are here; the keys are done with\n", "", RAW, WAR),
    _mutant("sm_80: keys behind the tile are not zeroed", SM80, "walk.first_key() + row < walk.end);",
            "true);", NUMBERS),
    _mutant("sm_80: values not transposed", TILE80, "arch::ldmatrix_x4_transposed(r, v", "arch::ldmatrix_x4(r, v",
            NUMBERS, every_push=True),
    _mutant("sm_80: the tile is read before it is put aside", TILE80,
            "      arch::shared_store(Q1M_SHARED_MEMBER(to, first_row), tile.first_row);\n    }\n    arch::block_sync();\n",
            "      arch::shared_store(Q1M_SHARED_MEMBER(to, first_row), tile.first_row);\n    }\n",
            RAW, "uninitialised"),
    _mutant("sm_80: swapped key fragments", TILE80, "{r[0], r[1]});\n          arch::mma_m16n8k16(quad(s[half], j + 1)",
            "{r[1], r[0]});\n          arch::mma_m16n8k16(quad(s[half], j + 1)", NUMBERS),
)  # fmt: skip
