"""The op tests catch what people get wrong in the kernels of sparse_estimate and sparse_plan.

As test_fused_mutants.py: one substitution in a copy of the sources, under which the op's own test
must fail.
"""

# ruff: noqa: E501 (a pattern is a line of the source, whatever its length)
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emu.test_fused_mutants import build_library
from emu.test_mutants import CSRC
from lib import compare, emulator
from lib.cases import case
from ops import test_sparse_estimate, test_sparse_plan

NUMBERS = "numbers"
RAW, WAR, UNINITIALISED = "race-read-after-write", "race-write-after-read", "uninitialised"


@dataclass(frozen=True)
class Mutant:
    """One error in csrc/ops/<op>/<op>_<file>, and the case that shows it."""

    op: str
    name: str
    case: str
    old: str
    new: str
    detectors: tuple[str, ...]
    every_push: bool = False
    file: str = "sm80.cuh"


def _estimate(name: str, shows: str, old: str, new: str, *detectors: str, **more: Any) -> Mutant:
    return Mutant("sparse_estimate", name, shows, old, new, detectors, **more)


def _plan(name: str, shows: str, old: str, new: str, *detectors: str, **more: Any) -> Mutant:
    return Mutant("sparse_plan", name, shows, old, new, detectors, **more)


MUTANTS = (
    _estimate("a step of the column sum is missing", "page", "for (int lanes = 4; lanes < 32;", "for (int lanes = 8; lanes < 32;", NUMBERS),
    _estimate("diagonals are not carried on", "page", "const float next = last ? 0.0f :", "const float next = true ? 0.0f :", NUMBERS,
              every_push=True),
    _estimate("a span's last diagonals are missing", "piece_plus_1", "last + 2 * kKeys,", "last + kKeys,", NUMBERS),
    _estimate("keys are used before they are there", "page",
              "      arch::block_sync();  // the tile is here; the one before is done with\n", "", RAW, UNINITIALISED, WAR),
    _estimate("eight rows are overwritten while they are read", "page",
              "        arch::shared_store(to, arch::shared_load(to) + sum);\n      }\n      arch::warp_sync();\n",
              "        arch::shared_store(to, arch::shared_load(to) + sum);\n      }\n", WAR, RAW),
    _estimate("the sum for its reciprocal", "page", "arch::global_store(to.l, 1.0f / l);", "arch::global_store(to.l, l);", NUMBERS),
    _estimate("the statistics of the first span only", "piece_plus_1", "span < p.args.grid.num_spans;", "span < 1;", NUMBERS),
    _estimate("attention's positions for the critical ones", "clamp", "if (!p.critical) return", "if (p.critical) return", NUMBERS,
              file="spans.h"),
    _plan("equal scores beyond the budget", "equal_scores", "&& --left < 0) words", "&& --left < -1) words", NUMBERS, every_push=True),
    _plan("counts are read before they are complete", "three_stages",
          "      arch::block_sync();\n      if (warp < kDigits) {", "      if (warp < kDigits) {", RAW, UNINITIALISED),
    _plan("a step's bits are overwritten while warp 0 reads them", "budgets_beyond_the_context",
          "      arch::block_sync();\n      if (arch::warp_index() == 0) {", "      if (arch::warp_index() == 0) {", RAW, UNINITIALISED),
    _plan("forced columns as many as diagonals", "three_stages", "(verticals ? kForcedVerticals : kForcedSlashes)", "kForcedSlashes", NUMBERS),
    _plan("the digit's place", "three_stages", "if (have >= remaining) break;", "if (have > 0) break;", NUMBERS),
    _plan("a run's end is missing", "three_stages_clustered",
          "          if (index > 0) store_run(list, stage, index - 1, 1, previous + 1);\n", "", NUMBERS),
)  # fmt: skip


def run_test(mutant: Mutant) -> tuple[set[str], str]:
    """Runs the op's test; returns what it found and the text."""
    try:
        if mutant.op == "sparse_estimate":
            inputs = case("sparse_estimate", mutant.case)
            test_sparse_estimate.test_matches_definition(inputs, "bf16", True, "emu_sm80")
        else:
            inputs = case("sparse_prefill", mutant.case)
            test_sparse_plan.test_matches_definition(inputs, {}, "emu_sm80")
    except emulator.EmulatorIssue as error:
        return set(re.findall(r"^\[([\w-]+)\]", str(error), re.MULTILINE)), str(error)
    except AssertionError as error:
        return {NUMBERS}, str(error)
    return set(), ""


def _parameters() -> list[Any]:
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
    path = Path("ops") / mutant.op / f"{mutant.op}_{mutant.file}"
    source = (CSRC / path).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: found {source.count(mutant.old)} times"
    broken = tmp_path / path
    broken.parent.mkdir(parents=True)
    broken.write_text(source.replace(mutant.old, mutant.new))
    library = build_library(mutant.op, tmp_path)
    monkeypatch.setattr(emulator, "_library", lambda: library)
    detected, text = run_test(mutant)
    assert detected & set(mutant.detectors), (
        f"expected one of {mutant.detectors}, got {sorted(detected)}\n{text[-3000:]}"
    )
