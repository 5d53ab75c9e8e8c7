"""The emulator and the op's cases catch what people get wrong in kernels (mutants.py).

Every mutant is compiled from a copy of the sources and run on one hard case; the unbroken kernels
must be clean under many seeds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from emu.decode_mutants import DECODE_MUTANTS
from emu.mutants import MUTANTS, NUMBERS, Mutant
from emu.sparse_mutants import SPARSE_MUTANTS
from lib.emulator import ROOT, library_path

CSRC = ROOT / "csrc"
DRIVERS = ROOT / "tests" / "emu"
ALL = (*MUTANTS, *DECODE_MUTANTS, *SPARSE_MUTANTS)
SEEDS = {"prefill": 20, "decode": 6, "sparse": 2}  # of the unbroken kernels
# The drivers' logits are three times as large as those of unit variance, for which the budgets of
# docs/numerics.md (attention/bf16_products: 6e-3 + 2^-8 of the value, lse 8e-3) are made.
MAX_ERROR, MAX_LSE_ERROR = 3 * 6e-3, 3 * 8e-3


@cache
def build_folder() -> Path:
    """Where the libraries of the C++ tests are."""
    library = library_path()
    if library is None:
        pytest.skip("the C++ tests are not built (make test builds them)")
    return library.parent


@cache
def compiler() -> str:
    """The compiler that built them."""
    cache_text = (build_folder() / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache_text, re.MULTILINE)
    assert found
    return found.group(1)


def build_driver(folder: Path, op: str, kernel: str, head_dim: int, fp8: bool = False) -> Path:
    """Compiles the driver; sources in `folder` hide those of csrc.

    Raises:
        AssertionError: It does not compile; the text is the compiler's.
    """
    out = folder / "driver"
    build = build_folder()
    libraries = [build / "csrc/arch/emu/libqwen1m_emu.a", build / "libqwen1m_cpu.a"]
    command = [
        compiler(), "-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fno-math-errno",
        f"-I{folder}", f"-I{CSRC}", f"-I{ROOT / 'include'}", f"-I{ROOT / 'tests/cpp'}",
        f"-I{DRIVERS}",
        f"-DDRIVER_SM90={int(kernel == 'sm90')}", f"-DDRIVER_DIM={head_dim}",
        f"-DDRIVER_FP8={int(fp8)}",
        str(DRIVERS / f"{op}_driver.cpp"), *map(str, libraries), "-lpthread", "-o", str(out),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return out


def run_driver(
    driver: Path, kernel: str, head_dim: int, seeds: int, fp8: bool = False
) -> tuple[set[str], str]:
    """Runs it with seeds 1, 2, ...; returns what was detected and the whole output."""
    result = subprocess.run(
        [driver, kernel, f"{head_dim}-fp8" if fp8 else str(head_dim), "1", str(seeds)],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    text = result.stdout + result.stderr
    assert result.returncode == 0, f"the driver ended with {result.returncode}:\n{text[-4000:]}"
    detected = set(re.findall(r"^issue (\S+)", text, re.MULTILINE))
    errors = re.search(r"^error (\S+) (\S+)$", text, re.MULTILINE)
    if errors is None:
        assert "refused" in detected, text[-4000:]
        return detected, text
    out, lse = map(float, errors.groups())
    if not (out <= MAX_ERROR and lse <= MAX_LSE_ERROR):
        detected.add(NUMBERS)
    return detected, text


def mutate(mutant: Mutant, folder: Path) -> None:
    """Writes the broken source below `folder`."""
    text = (CSRC / mutant.file).read_text()
    assert text.count(mutant.old) == mutant.count, (
        f"{mutant.name}: found {text.count(mutant.old)} times, expected {mutant.count}"
    )
    broken = folder / mutant.file
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text(text.replace(mutant.old, mutant.new))


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("kernel", ["sm90", "sm80"])
@pytest.mark.parametrize("op", SEEDS)
def test_the_kernels_are_clean_under_many_seeds(
    op: str, kernel: str, head_dim: int, tmp_path: Path
) -> None:
    """No issue, and errors within the budgets."""
    driver = build_driver(tmp_path, op, kernel, head_dim)
    detected, text = run_driver(driver, kernel, head_dim, SEEDS[op])
    assert not detected, text


@pytest.mark.parametrize(("kernel", "head_dim"), [("sm90", 128), ("sm80", 64)])
def test_the_fp8_kernels_are_clean(kernel: str, head_dim: int, tmp_path: Path) -> None:
    """As above, on two seeds; one seed of all four is a C++ test."""
    driver = build_driver(tmp_path, "decode", kernel, head_dim, fp8=True)
    detected, text = run_driver(driver, kernel, head_dim, 2, fp8=True)
    assert not detected, text


def _parameters() -> list:
    return [
        pytest.param(m, id=m.name.replace(" ", "_"), marks=[] if m.every_push else pytest.mark.soak)
        for m in ALL
    ]


@pytest.mark.parametrize("mutant", _parameters())
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    """With one seed in `make test`; more in the soak run."""
    mutate(mutant, tmp_path)
    driver = build_driver(tmp_path, mutant.op, mutant.kernel, mutant.head_dim, mutant.fp8)
    seeds = 1 if mutant.every_push else 4 if mutant.op == "prefill" else 2
    detected, text = run_driver(driver, mutant.kernel, mutant.head_dim, seeds, mutant.fp8)
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert detected & mutant.detectors, (
        f"expected one of {sorted(mutant.detectors)}, got {sorted(detected)}\n{text[-3000:]}"
    )


def test_mutants_have_different_names() -> None:
    """Their names are the ids of the tests."""
    assert len({m.name for m in ALL}) == len(ALL)
