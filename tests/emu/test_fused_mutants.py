"""The op tests catch what people get wrong in elementwise kernels (fused_mutants.py)."""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from emu.fused_mutants import MUTANTS, NUMBERS, Mutant
from emu.test_mutants import CSRC, build_folder, compiler
from lib import compare, emulator
from lib.cases import case


def mutate(mutant: Mutant, folder: Path) -> None:
    """Writes the broken kernel below `folder`."""
    path = Path("ops") / mutant.op / f"{mutant.op}_{mutant.file}"
    text = (CSRC / path).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: found {text.count(mutant.old)} times"
    broken = folder / path
    broken.parent.mkdir(parents=True)
    broken.write_text(text.replace(mutant.old, mutant.new))


def build_library(op: str, folder: Path) -> ctypes.CDLL:
    """The op's emulated kernel; sources in `folder` hide those of csrc."""
    build, out = build_folder(), folder / "broken.so"
    command = [
        compiler(), "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off",
        f"-I{folder}", f"-I{CSRC}", f"-I{emulator.ROOT / 'include'}",
        str(CSRC / "ops" / op / f"{op}_emu.cpp"),
        str(build / "csrc/arch/emu/libqwen1m_emu.a"), str(build / "libqwen1m_cpu.a"),
        "-o", str(out),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return ctypes.CDLL(str(out))


def run_test(mutant: Mutant) -> tuple[set[str], str]:
    """Runs the op's test; returns what it found and the text."""
    test = getattr(importlib.import_module(f"ops.test_{mutant.op}"), mutant.test)
    arguments: dict[str, Any] = {"device": mutant.device}
    if mutant.case:
        arguments["case"] = case(mutant.op, mutant.case)
        by_name = mutant.op != "embedding"  # whose test is about bits
        arguments["dtype"] = "bf16" if by_name else torch.bfloat16
    if mutant.test == "test_fp8_cache_holds_the_rounded_values":
        arguments |= {"name": arguments.pop("case")["id"], "dtype": torch.bfloat16}
    if mutant.test == "test_rows_without_a_token":
        arguments["temperature"] = 1.0
    if mutant.test == "test_out_may_be_x":
        arguments |= {"dtype": torch.bfloat16, "with_residual": False}
    try:
        test(**arguments)
    except emulator.EmulatorIssue as error:
        return set(re.findall(r"^\[([\w-]+)\]", str(error), re.MULTILINE)), str(error)
    except AssertionError as error:
        return {NUMBERS}, str(error)
    except RuntimeError as error:
        return {"refused"}, str(error)
    return set(), ""


def _parameters() -> list:
    return [
        pytest.param(
            m,
            id=f"{m.op}: {m.name}".replace(" ", "_"),
            marks=[] if m.every_push else pytest.mark.soak,
        )
        for m in MUTANTS
    ]


@pytest.mark.parametrize("mutant", _parameters())
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its detectors fires, and none on the unbroken kernel."""
    monkeypatch.setattr(compare, "used", {})  # a broken kernel's errors are nobody's budget
    detected, text = run_test(mutant)
    assert not detected, text
    mutate(mutant, tmp_path)
    library = build_library(mutant.op, tmp_path)
    monkeypatch.setattr(emulator, "_library", lambda: library)
    detected, text = run_test(mutant)
    assert detected & mutant.detectors, (
        f"expected one of {sorted(mutant.detectors)}, got {sorted(detected)}\n{text[-3000:]}"
    )
