"""Every CUDA kernel by name: registers, spills, shared memory, and the instructions it is made of.

kernels.json is the table. A kernel that is missing, or that is not in the table, fails.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lib import cuda_objects
from lib.cuda_objects import Usage, compile_cubin, complaints, count, parse_log, parse_sass

FILE = json.loads(Path(__file__).with_name("kernels.json").read_text())
TABLE: dict[str, dict[str, Any]] = FILE["kernels"]
LOCAL_MEMORY = ("LDL", "STL")


def excesses(name: str, usage: Usage) -> list[str]:
    """What of a kernel goes beyond its line in the table."""
    limit = TABLE[name]
    found = []
    for what, allowed in (
        ("registers", limit["max_registers"]),
        ("static_shared_bytes", 0),
        ("stack_bytes", 0),
        ("spill_bytes", 0),
    ):
        if getattr(usage, what) > allowed:
            found.append(f"{name}: {getattr(usage, what)} {what}, allowed {allowed}")
    return found


def wrong_instructions(name: str, opcodes: Counter[str], same_nvcc: bool) -> list[str]:
    """Counts that are not those of the table; another nvcc may unroll differently, so > 0 then."""
    found = []
    for family, expected in TABLE[name].get("instructions", {}).items():
        number = count(opcodes, family)
        if number != expected if same_nvcc else number == 0:
            found.append(f"{name}: {number} {family}, expected {expected}")
    for family in LOCAL_MEMORY:
        if count(opcodes, family):
            found.append(f"{name}: {count(opcodes, family)} {family}, a spill")
    return found


def test_the_table_is_what_was_compiled(kernel_objects: list[Path]) -> None:
    """No kernel is missing and none is unknown; none uses more than it may."""
    found: dict[str, Usage] = {}
    for path in kernel_objects:
        found |= parse_log(path.with_name(path.name + ".log").read_text())
    assert sorted(found) == sorted(TABLE)
    assert [text for name, usage in found.items() for text in excesses(name, usage)] == []


def test_the_compiler_does_not_complain(kernel_objects: list[Path]) -> None:
    """No warning, above all none of serialised products (C7510 and its neighbours)."""
    assert kernel_objects
    for path in kernel_objects:
        assert complaints(path.with_name(path.name + ".log").read_text()) == []


def test_instructions(kernel_objects: list[Path], disassembler: None) -> None:
    """The asynchronous products and copies are there, as many as are checked in; no spills."""
    release = re.search(r"release ([\d.]+)", cuda_objects.run(cuda_objects.NVCC, "--version"))
    same_nvcc = release is not None and release[1] == FILE["nvcc"]
    found: dict[str, Counter[str]] = {}
    for path in kernel_objects:
        found |= cuda_objects.sass(path)
    assert sorted(found) == sorted(TABLE)
    wrong = [
        text for name, code in found.items() for text in wrong_instructions(name, code, same_nvcc)
    ]
    assert wrong == []


def test_shared_memory(tmp_path: Path) -> None:
    """kernel_limits.cu states the dynamic shared memory of each kernel as static_asserts."""
    if cuda_objects.NVCC is None:
        pytest.skip("no nvcc")
    source = Path(__file__).with_name("kernel_limits.cu")
    for kernel in {name.split("@")[0] for name in TABLE}:
        assert kernel in source.read_text(), f"{kernel} is not in {source.name}"
    compile_cubin(source, "90a", tmp_path)


# --- The checks themselves ------------------------------------------------------------------------

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for '{architecture}'
ptxas info    : Function properties for {kernel}
    {stack} bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 6 barriers, 2048 bytes smem, 576 bytes cmem[0]
"""


def test_a_spilling_kernel_is_found() -> None:
    name = next(iter(TABLE))
    kernel, architecture = name.split("@")
    log = LOG.format(kernel=kernel, architecture=architecture, stack=16, stores=8, registers=256)
    usage = parse_log(log)[name]
    assert usage == Usage(256, stack_bytes=16, spill_bytes=12, static_shared_bytes=2048)
    for word in ("256 registers", "16 stack_bytes", "12 spill_bytes", "2048 static_shared_bytes"):
        assert word in " ".join(excesses(name, usage))


def test_a_serialised_product_is_found() -> None:
    line = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers"
    )
    assert complaints(LOG + line + "\n") == [line]
    assert complaints(LOG) == []


def test_a_missing_instruction_and_a_spill_are_found() -> None:
    name = next(name for name, limit in TABLE.items() if "HGMMA" in limit.get("instructions", {}))
    kernel, architecture = name.split("@")
    text = (
        f"\tarch = {architecture}\n\t\tFunction : {kernel}\n"
        "        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ ;\n"
        "        /*0020*/              @!P0 STL.64 [R1], R2 ;\n"
    )
    code = parse_sass(text)[name]
    assert code == Counter({"HGMMA.64x128x16.F32.BF16": 1, "STL.64": 1})
    for same_nvcc in (True, False):
        wrong = " ".join(wrong_instructions(name, code, same_nvcc))
        assert "0 UTMALDG" in wrong and "1 STL" in wrong
        assert ("1 HGMMA" in wrong) == same_nvcc
