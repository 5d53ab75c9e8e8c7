"""Same output in every way in which an engine may come to a request; see `lib/same_output.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lib.same_output import NEAR_TIE, WAYS, Answer, Case, Setup, alone, compare, make_cases
from qwen1m_ext import demo_model_path
from qwen1m_ext.sparse_config import SparseSettings

WINDOW = 1024  # of sparse prefill: several in a short prompt


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["dense", "sparse"])
def single(dtype: str, request: pytest.FixtureRequest) -> tuple[Setup, list[Case], list[Answer]]:
    """Requests below and beyond the trained length, and what they give alone."""
    options: dict[str, object] = {"dtype": dtype, "attention": request.param}
    if request.param == "sparse":
        options["sparse_settings"] = SparseSettings(positions="real", window_tokens=WINDOW)
    chunk = WINDOW if request.param == "sparse" else 256
    setup = Setup(Path(demo_model_path()), options, chunk)
    cases = make_cases([1400, 5000], max_tokens=32)
    return setup, cases, alone(setup, cases)


@pytest.mark.parametrize("way", WAYS)
def test_same_output(dtype: str, single: tuple[Setup, list[Case], list[Answer]], way: str) -> None:
    """float32: every token. bf16: a token that differs stands at a near-tie."""
    setup, cases, want = single
    report = compare(*WAYS[way](setup, cases, want))
    assert not report.beyond
    if dtype == "float32":
        assert report.differing == 0 and report.logprob_error < 1e-4
    else:
        assert report.logprob_error < NEAR_TIE
    assert report.near_ties < 0.1 * report.steps_alone, "too many to say anything"


def test_a_comparison_that_must_fail() -> None:
    single = Answer([1, 2, 3], [2.0, 0.01, 3.0], [-0.1] * 3, 0)

    def report(*tokens: int):
        return compare([dataclasses.replace(single, tokens=list(tokens))], [single])

    assert report(1, 2, 3).differing == 0
    near = report(1, 7, 8)
    assert (near.differing, near.steps, near.widest_gap, near.beyond) == (1, 1, 0.01, [])
    assert report(7, 2, 3).beyond == ["request 0, step 0: 7 in place of 1, 2.000 apart"]
    assert report(1, 2, 4).beyond
