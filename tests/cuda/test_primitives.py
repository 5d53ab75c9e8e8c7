"""Each primitive of csrc/arch/cuda becomes the instruction it stands for, and nothing beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lib import cuda_objects
from lib.cuda_objects import compile_cubin, count

# Probe kernel (tests/cuda/primitives_*.cu) -> families of instructions and their number.
SM80 = {
    "shared_load_16": {"LDS.128": 1},
    "shared_load_8": {"LDS.64": 1},
    "shared_load_4": {"LDS": 1},
    "shared_load_2": {"LDS.U16": 1},
    "shared_store_16": {"STS.128": 1},
    "shared_store_8": {"STS.64": 1},
    "shared_store_4": {"STS": 1},
    "shared_store_2": {"STS.U16": 1},
    "global_load_16": {"LDG.E.128.CONSTANT": 1, "STG.E.128": 1},
    "global_load_8": {"LDG.E.64.CONSTANT": 1, "STG.E.64": 1},
    "global_load_4": {"LDG.E.CONSTANT": 1, "STG.E": 1},
    "global_load_2": {"LDG.E.U16.CONSTANT": 1, "STG.E.U16": 1},
    "global_load_1": {"LDG.E.U8.CONSTANT": 1, "STG.E.U8": 1},
    "global_load_coherent": {"LDG.E": 1, "LDG.E.CONSTANT": 0},
    "global_load_acquire": {"LDG.E.STRONG.GPU": 1, "CCTL.IVALL": 1},
    "global_store_release": {"MEMBAR": 1, "STG.E.STRONG.GPU": 1},
    "atomic_add": {"MEMBAR": 1, "ATOMG.E.ADD.STRONG.GPU": 1, "CCTL.IVALL": 1},
    "reduce_add": {"RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1, "MEMBAR": 0},
    "fence_device": {"MEMBAR": 1},
    "warp_index": {"SHFL.IDX": 1},
    "shuffle_xor": {"SHFL.BFLY": 1},
    "shuffle": {"SHFL.IDX": 1},
    "warp_sync": {"BAR": 0},
    "block_sync": {"BAR.SYNC": 1},
    "named_barrier_sync": {"BAR.SYNC": 1},
    "named_barrier_arrive": {"BAR.ARV": 1},
    "cp_async": {"LDGSTS.E.BYPASS.128": 1, "LDGDEPBAR": 1, "DEPBAR.LE": 1},
    "ldmatrix_x4": {"LDSM.16.M88.4": 1},
    "ldmatrix_x4_transposed": {"LDSM.16.MT88.4": 1},
    "mma_m16n8k16": {"HMMA.16816.F32.BF16": 1},
    "mma_m16n8k16_f16": {"HMMA.16816.F32": 1, "HMMA.16816.F32.BF16": 0},
    "e4m3_to_f16": {"STG.E": 1},  # sm_80: a multiplication; sm_90: a conversion
    "pack_e4m3": {"STG.E": 1},  # sm_80: integers; sm_90: a conversion
    "pack_f16": {"F2FP": 1, "F2FP.BF16": 0},
    "permute_bytes": {"PRMT": 1},
    "exp2_approx": {"MUFU.EX2": 1, "FMUL": 0},
    "log2_approx": {"MUFU.LG2": 1, "FMUL": 0},
    "reciprocal_approx": {"MUFU.RCP": 1, "FMUL": 0},
    "multiply": {"FMUL": 1, "FADD": 1, "FFMA": 0},
    "pack_bf16": {"F2FP.BF16": 1},
    "bf16_low_high": {"FADD": 1},
    "before_clusters": {"STG.E": 1},
}
SM90 = {
    "cluster_rank": {"S2R": 1},
    "cluster_size": {"STG.E": 1},
    "cluster_arrive": {"UCGABAR_ARV": 1},
    "cluster_wait": {"UCGABAR_WAIT": 1},
    "elect_one": {"ELECT": 1},
    "mbarrier_init": {"SYNCS.EXCH.64": 1},
    "fence_mbarrier_init": {"MEMBAR": 0},  # the order of issue is enough for sm_90
    "mbarrier_arrive": {"SYNCS.ARRIVE": 1, "MEMBAR": 0},
    "mbarrier_arrive_expect_tx": {"SYNCS.ARRIVE": 1, "MEMBAR": 0},
    "mbarrier_arrive_remote": {"SYNCS.ARRIVE": 1, "MEMBAR": 0},
    "shared_load_remote": {"LD.E": 1},
    "mbarrier_wait": {"SYNCS.PHASECHK": 2, "CCTL": 0},
    "fence_proxy_async": {"FENCE.VIEW.ASYNC": 1},
    "tma_load": {"UTMALDG.5D": 1, "UTMALDG.5D.MULTICAST": 0},
    "tma_load_multicast": {"UTMALDG.5D.MULTICAST": 1},
    "tma_store": {"UTMASTG.5D": 1, "UTMACMDFLUSH": 1, "DEPBAR.LE": 1},
    "bulk_load": {"UBLKCP.S.G": 1},
    "bulk_store": {"UBLKCP.G.S": 1, "UTMACMDFLUSH": 1, "DEPBAR.LE": 1},
    "stmatrix_x4": {"STSM.16.M88.4": 1},
    "registers_decrease": {"USETMAXREG.DEALLOC": 1},
    "registers_increase": {"USETMAXREG.TRY_ALLOC": 1},
    "wait_for_prior_grid": {"ACQBULK": 1},
    "launch_dependents": {"PREEXIT": 1},
} | {
    # Two products and one wait each: a wait per product would mean that ptxas serialises them.
    f"wgmma_{kind}": {
        f"HGMMA.64x{kind.split('_')[1]}x16.F32.BF16": 2,
        "WARPGROUP.ARRIVE": 1,
        "WARPGROUP.DEPBAR": 1,
    }
    for kind in (
        "ss_64_k_k", "ss_64_mn_mn", "ss_128_k_k", "ss_128_k_mn",
        "rs_64_k", "rs_64_mn", "rs_128_k", "rs_128_mn",
    )
}  # fmt: skip


def wrong(expected: dict[str, dict[str, int]], found: dict[str, Counter[str]]) -> list[str]:
    """Every probe whose instructions are not those expected."""
    texts = []
    for probe, families in expected.items():
        for family, number in families.items():
            if (actual := count(found[probe], family)) != number:
                texts.append(f"{probe}: {actual} {family}, expected {number}")
        texts += [f"{probe}: {op}, a spill" for op in ("LDL", "STL") if count(found[probe], op)]
    return texts


@pytest.mark.parametrize(
    ("file", "architecture", "expected"),
    [("primitives_sm80", "80", SM80), ("primitives_sm90", "90a", SM90)],
    ids=["sm_80", "sm_90a"],
)
def test_instructions(
    file: str,
    architecture: str,
    expected: dict[str, dict[str, int]],
    tmp_path: Path,
    disassembler: None,
) -> None:
    """Compiled without a warning, and what nvdisasm shows is the table above."""
    if cuda_objects.NVCC is None:
        pytest.skip("no nvcc")
    cubin = compile_cubin(Path(__file__).with_name(f"{file}.cu"), architecture, tmp_path)
    found = {name.split("@")[0]: code for name, code in cuda_objects.sass(cubin).items()}
    assert sorted(found) == sorted(expected)
    assert wrong(expected, found) == []


def test_a_wrong_instruction_is_found() -> None:
    code = {"exp2_approx": Counter({"MUFU.EX2": 1, "FMUL": 2, "STL": 1})}
    texts = wrong({"exp2_approx": SM80["exp2_approx"]}, code)
    assert texts == ["exp2_approx: 2 FMUL, expected 0", "exp2_approx: STL, a spill"]
