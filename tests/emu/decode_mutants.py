"""Planted errors of the decode_attention kernels; see mutants.py."""

# ruff: noqa: E501 (a pattern is a line of the source, whatever its length)
from __future__ import annotations

from emu.mutants import DEADLOCK, LAUNCH, NUMBERS, RAW, RING, ROWS, WAR, WAW, Mutant

_OP = "ops/decode_attention/decode_attention_"
SM90, SM80, KERNEL, MERGE, SPLITS = (
    _OP + name for name in ("sm90.cuh", "sm80.cuh", "kernel.h", "merge.h", "splits.h")
)
FP8 = _OP + "fp8.h"
UNINITIALISED, GLOBAL_RACE = "uninitialised", "global-race"


def _mutant(
    name: str, file: str, old: str, new: str, *detectors: str, **options: str | int | bool
) -> Mutant:
    kernel = "sm80" if file == SM80 else "sm90"
    return Mutant(
        f"decode: {name}", file, old, new, frozenset(detectors),
        **({"kernel": kernel, "op": "decode"} | options),
    )  # fmt: skip


def _fp8(name: str, *rest: str, **options: str | int | bool) -> Mutant:
    return _mutant(f"fp8: {name}", *rest, fp8=True, **options)


DECODE_MUTANTS = (
    # --- The ring of sm_90 ---------------------------------------------------------------------
    _mutant("the ring's parity never flips", RING, "round ^= 1;", "round ^= 0;",
            RAW, WAR, DEADLOCK, "mbarrier-phase"),
    _mutant("no fence after the inits", SM90, "      arch::fence_mbarrier_init();\n", "", "proxy-fence"),
    _mutant("too few bytes expected", SM90, "expect_tx(full_[stage], sizeof(Stage))",
            "expect_tx(full_[stage], sizeof(Stage) / 2)", "mbarrier-phase", "mbarrier-bytes", RAW, DEADLOCK),
    _mutant("values are not loaded", SM90,
            "      arch::tma_load(Q1M_SHARED_MEMBER(to, v).template as<void>(), p_.v_map, full_[stage], from);\n",
            "", DEADLOCK),
    _mutant("a stage is not waited for", SM90, "    ring_.wait_full(full_);\n", "", RAW, UNINITIALISED,
            every_push=True),
    _mutant("the tail of the last page is not zeroed", SM90,
            "    if (rows_left < kKeys) zero_tail(rows_left);\n", "", NUMBERS),
    _mutant("the tail is read before it is zeroed", SM90,
            "arch::Vec16{});\n    }\n    arch::warp_sync();\n", "arch::Vec16{});\n    }\n", RAW),
    _mutant("the page of the step before", SM90,
            "    if (step + 1 < steps_.count) page_ = load_page(step + 1);\n",
            "    if (step + 1 < steps_.count) page_ = load_page(step);\n", NUMBERS),
    # --- The ring of sm_80 ---------------------------------------------------------------------
    _mutant("sm_80: one stage too many may be on its way", SM80, "arch::cp_async_wait<kStages - 1>();",
            "arch::cp_async_wait<kStages>();", RAW, UNINITIALISED, every_push=True),
    _mutant("sm_80: other lanes' copies are not waited for", SM80,
            "    arch::cp_async_wait<kStages - 1>();\n    arch::warp_sync();\n",
            "    arch::cp_async_wait<kStages - 1>();\n", RAW, UNINITIALISED),
    _mutant("sm_80: no empty groups behind the last step", SM80,
            "page_ = load_page(step + 1);\n    }\n    arch::cp_async_commit();\n",
            "page_ = load_page(step + 1);\n      arch::cp_async_commit();\n    }\n", RAW, UNINITIALISED),
    _mutant("sm_80: keys behind the sequence are not zeroed", SM80,
            "key + chunk / kChunks < work_.kv_len", "true", NUMBERS),
    # --- The kernel ----------------------------------------------------------------------------
    _mutant("a stage is filled while lanes read it", KERNEL,
            "      arch::warp_sync();  // all lanes are done with the stage\n", "", WAR, every_push=True),
    _mutant("queries are read before they are rotated", KERNEL,
            "    arch::block_sync();                     // the queries are there\n", "", RAW, UNINITIALISED),
    _mutant("causal mask off by one", KERNEL, "key >= end[h]", "key > end[h]", NUMBERS),
    _mutant("keys before a border are seen twice", KERNEL, "key < begin || key >= end[h]",
            "key >= end[h]", NUMBERS, head_dim=64),
    _mutant("the split's end is not masked", KERNEL, "last_key >= work.keys.end ||", "", NUMBERS, head_dim=64),
    _mutant("steps with later keys are not masked", KERNEL, "last_key >= all_see;", "false;", NUMBERS),
    _mutant("successive keys as intra ones", KERNEL, "apart >= 2 ? 0 : apart == 1 ? 1 : 2",
            "apart >= 2 ? 0 : 2", NUMBERS),
    _mutant("one position for all query tokens", KERNEL,
            "const int64_t token = work.token(row), apart", "const int64_t token = work.token(0), apart",
            NUMBERS),
    _mutant("one temperature for all query tokens", MERGE,
            "const int q_token = work.q_token(row < work.num_rows ? row : work.num_rows - 1);",
            "const int q_token = 0;", NUMBERS, every_push=True),
    _mutant("the temperature of another row in the products", KERNEL, "scale_log2(args, work, row);",
            "scale_log2(args, work, 16 * tile);", NUMBERS),
    _mutant("the temperature of another row in the merge of warps", MERGE,
            "scale_log2(launch.args, work, block_row);", "scale_log2(launch.args, work, 0);", NUMBERS),
    _mutant("the temperature of another row in the merge of splits", MERGE,
            "scale_log2(launch.args, work, row);", "scale_log2(launch.args, work, 0);", NUMBERS),
    _mutant("temperatures of rows that do not exist", MERGE, "row < work.num_rows ? row : work.num_rows - 1",
            "row", "global-bounds"),
    _mutant("rows without keys are not thought of", KERNEL, "template step<true>", "template step<false>",
            NUMBERS),
    _mutant("values not transposed", KERNEL, "arch::ldmatrix_x4_transposed(r, v", "arch::ldmatrix_x4(r, v",
            NUMBERS),
    # --- The merge -----------------------------------------------------------------------------
    _mutant("the stages are overwritten while others read them", MERGE,
            "    arch::block_sync();  // the stages are done with\n", "", WAR, WAW),
    _mutant("maxima are read before they are there", MERGE,
            "        }\n      }\n    }\n    arch::block_sync();\n", "        }\n      }\n    }\n",
            RAW, UNINITIALISED),
    _mutant("a tile overwrites the one before", MERGE,
            "      if (tile + 1 < kRowTiles) arch::block_sync();  // before the next tile overwrites it\n",
            "", WAR),
    _mutant("warps are not weighted", MERGE,
            "merge_weight(softmax[tile].m[h], maximum_of(all_m, 16 * tile + row), scales[tile][h]);", "1.0f;",
            NUMBERS),
    _mutant("the counter goes up before all have written", MERGE,
            "    arch::block_sync();  // all warps have written\n", "", GLOBAL_RACE),
    _mutant("the counter is not reset", MERGE,
            "      if (before + 1 == static_cast<uint32_t>(work.num_splits)) arch::global_store(counter, 0u);\n",
            "", "counter", NUMBERS),
    _mutant("the last but one merges", MERGE, "arch::shared_load(splits_before) + 1 !=",
            "arch::shared_load(splits_before) + 2 !=", GLOBAL_RACE, NUMBERS, every_push=True),
    _mutant("sequences share a counter", MERGE, "launch.counters + work.sequence", "launch.counters",
            GLOBAL_RACE, NUMBERS, "counter"),
    _mutant("partial results through the read-only path", MERGE,
            "l += weight * arch::global_load_coherent(m + kRows)", "l += weight * arch::global_load(m + kRows)",
            "global-read-only"),
    _mutant("sums are not weighted", MERGE, "l += weight * ", "l += ", NUMBERS),
    _mutant("no weights behind the last split", MERGE, "i < count + kUnroll; i += 32", "i < count; i += 32",
            UNINITIALISED, NUMBERS),
    _mutant("weights are overwritten while lanes read them", MERGE,
            "    arch::warp_sync();  // before the next row's weights\n", "", WAR),
    _mutant("weights are read before they are there", MERGE,
            "l += arch::shuffle_xor(l, step);\n    arch::warp_sync();\n",
            "l += arch::shuffle_xor(l, step);\n", RAW),
    # --- An fp8 cache --------------------------------------------------------------------------
    _fp8("queries in their plain order", FP8, "chunk / 2 * 2 + w % 2).address", "chunk / 2 * 2 + w / 4).address",
         NUMBERS, WAW, UNINITIALISED, every_push=True),
    _fp8("queries in bf16", FP8, "arch::pack_f16(x0 * c0 - y0 * s0", "arch::pack_bf16(x0 * c0 - y0 * s0", NUMBERS),
    _fp8("queries of the step before", FP8, "a[i % 2][tile]", "a[0][tile]", NUMBERS),
    _fp8("keys of the other eight", FP8, "quad(s[tile], j + i / 2)", "quad(s[tile], j + i % 2)", NUMBERS),
    _fp8("a chunk of keys too far", FP8, "step + lane / 8 % 2)", "2 * step + lane / 8 % 2)", NUMBERS, RAW, UNINITIALISED),
    _fp8("the lower pair twice", FP8, "arch::e4m3_to_f16(four >> 16)", "arch::e4m3_to_f16(four & 0xffffu)", NUMBERS,
         every_push=True),
    _fp8("even and odd dims swapped", FP8, "0x6420u : 0x7531u", "0x7531u : 0x6420u", NUMBERS),
    _fp8("probabilities in bf16", FP8, "arch::pack_f16(s[8 * step", "arch::pack_bf16(s[8 * step", NUMBERS),
    _fp8("values not transposed", FP8, "arch::ldmatrix_x4_transposed(r, v", "arch::ldmatrix_x4(r, v", NUMBERS),
    _fp8("dims of the output in the products' order", MERGE,
         "{{x[0] * weight, x[4] * weight, x[1] * weight, x[5] * weight}}",
         "{{x[0] * weight, x[1] * weight, x[4] * weight, x[5] * weight}}", NUMBERS),
    _fp8("logits without the scale of keys", MERGE,
         "    if constexpr (kFp8) scale *= arch::global_load(p.k_scale.at(work.kv_head));\n", "", NUMBERS),
    _fp8("outputs without the scale of values", MERGE,
         "    if constexpr (kFp8) norm *= arch::global_load(p.v_scale.at(work.kv_head));\n", "", NUMBERS,
         every_push=True),
    _fp8("the scales of keys and values swapped", MERGE, "p.k_scale.at(work.kv_head)", "p.v_scale.at(work.kv_head)",
         NUMBERS),
    _fp8("rows of 64 bytes as rows of 128", ROWS, "if constexpr (kHeadDim == 32)", "if constexpr (kHeadDim == 33)",
         NUMBERS, RAW, WAR, WAW, UNINITIALISED, head_dim=64),
    _fp8("sm_80: rows of 64 bytes as rows of 128", ROWS, "if constexpr (kHeadDim == 32)",
         "if constexpr (kHeadDim == 33)", NUMBERS, RAW, WAR, WAW, UNINITIALISED, head_dim=64, kernel="sm80"),
    _fp8("boxes of 64-byte rows are not swizzled", LAUNCH, "arch::Swizzle::k64}", "arch::Swizzle::kNone}", NUMBERS,
         head_dim=64),
    _fp8("a page is twice as wide", _OP + "launch.h", "cache.sizes[3] /= 2;", "cache.sizes[3] /= 1;", NUMBERS, "refused",
         "global-bounds", "tensor-map", DEADLOCK, head_dim=64),
    _fp8("sm_80: keys behind the sequence are not zeroed", SM80, "key + chunk / kChunks < work_.kv_len", "true",
         NUMBERS, head_dim=64, kernel="sm80"),
    _fp8("the tail of the last page is not zeroed", SM90, "    if (rows_left < kKeys) zero_tail(rows_left);\n", "",
         NUMBERS, head_dim=64),
    # --- The splits ----------------------------------------------------------------------------
    _mutant("no border at the chunk before", SPLITS, "first_chunk > 2 ? first_chunk - 1 : 1",
            "first_chunk > 2 ? first_chunk : 1", NUMBERS),
    _mutant("a split begins before its border", SPLITS, "begin > all.begin ? begin : all.begin", "begin",
            NUMBERS),
)  # fmt: skip
