"""When a prompt is prefilled sparsely, and the reason that is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import model_config
from qwen1m_ext.config import load_config
from qwen1m_ext.crossover import crossing
from qwen1m_ext.errors import ConfigError
from qwen1m_ext.machine import cpu_name
from qwen1m_ext.prefill_policy import CROSSOVER_FILE, Crossover, PrefillPolicy, load_crossover
from qwen1m_ext.request import AttentionName
from qwen1m_ext.sparse_config import FILE_NAME, SparseConfig

SAMPLES = [
    {"tokens": 1000.0, "dense_seconds": 1.0, "sparse_seconds": 2.0},
    {"tokens": 4000.0, "dense_seconds": 4.0, "sparse_seconds": 2.0},
]


def policy(
    directory: Path,
    attention: AttentionName = "auto",
    *,
    refined: bool = True,
    dca: dict[str, Any] | None = None,
    crossover: dict[str, Any] | None = None,
    plain: bool = False,
    chunk_tokens: int = 32_768,
) -> PrefillPolicy:
    chunks = {"chunk_size": 64, "local_size": 16} | (dca or {})
    text = json.dumps(model_config(dual_chunk_attention_config=chunks))
    (directory / "config.json").write_text(text)
    config = load_config(directory)
    if refined:
        SparseConfig.default(config).save(directory / FILE_NAME)
    if crossover is not None:
        values = {"tokens": 50_000, "machine": cpu_name(), "dtype": "bfloat16", "threads": 2,
                  "samples": SAMPLES, "date": "2026-01-01", "command": "x"}  # fmt: skip
        Crossover(**(values | crossover)).save(directory)
    return PrefillPolicy.load(attention, directory, config, "bfloat16", plain=plain,
                              chunk_tokens=chunk_tokens)  # fmt: skip


def test_auto_follows_threshold_and_crossover(tmp_path: Path) -> None:
    for name, options, limit, words in (
        ("default", {}, 32_768, "no crossover was measured"),
        ("own", {"dca": {"sparse_attention_threshold": 100}}, 100, "is 100 tokens"),
        ("later", {"crossover": {}}, 50_000, "measured here is 50,000 tokens"),
        ("earlier", {"crossover": {"tokens": 9}}, 32_768, "measured here is 9 tokens"),
        ("foreign", {"crossover": {"machine": "abacus"}}, 32_768, "of abacus, bfloat16 does not"),
        ("dtype", {"crossover": {"dtype": "float32"}}, 32_768, "float32 does not count"),
    ):
        directory = tmp_path / name
        directory.mkdir()
        auto = policy(directory, **options)  # type: ignore[arg-type]
        assert auto.auto_tokens == limit and words in auto.reason
        assert not auto.is_sparse(None, limit) and auto.is_sparse(None, limit + 1)
        assert auto.is_sparse("sparse", 1) and not auto.is_sparse("dense", 10**6)


def test_auto_is_dense_where_sparsity_was_not_intended(tmp_path: Path) -> None:
    for name, options, words in (
        ("none", {"refined": False}, "has no refined budgets"),
        ("off", {"dca": {"sparse_attention_enabled": False}}, "sparse_attention_enabled: false"),
        ("plain", {"plain": True}, "plain RoPE"),
        ("chunk", {"chunk_tokens": 100}, "prefill_chunk_tokens 100 is less than a window of 32768"),
    ):
        directory = tmp_path / name
        directory.mkdir()
        auto = policy(directory, **options)  # type: ignore[arg-type]
        assert auto.auto_tokens is None and words in auto.reason
        assert not auto.is_sparse(None, 10**6) and auto.is_sparse("sparse", 10)


@pytest.mark.parametrize(("attention", "is_sparse"), [("dense", False), ("sparse", True)])
def test_the_engines_choice_holds_unless_a_request_chooses(
    tmp_path: Path, attention: AttentionName, is_sparse: bool
) -> None:
    chosen = policy(tmp_path, attention)
    assert [chosen.is_sparse(None, n) for n in (1, 10**6)] == [is_sparse] * 2
    assert chosen.is_sparse("auto", 40_000) and not chosen.is_sparse("auto", 100)


def test_a_crossover_is_kept_and_checked(tmp_path: Path) -> None:
    assert load_crossover(tmp_path) is None
    written = Crossover(5, "m", "bfloat16", 1, SAMPLES, "2026-01-01", "command")
    assert written.save(tmp_path).name == CROSSOVER_FILE and load_crossover(tmp_path) == written
    for text, words in (
        ("[]", "expected a JSON object, got list"),
        ("{}", "missing 7 required"),
        (json.dumps(vars(written) | {"more": 1}), "unexpected keyword argument 'more'"),
        (json.dumps(vars(written) | {"tokens": "5"}), "tokens: expected an integer >= 0, got '5'"),
    ):
        (tmp_path / CROSSOVER_FILE).write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_crossover(tmp_path)


def test_the_crossing_is_interpolated_on_logarithmic_axes() -> None:
    assert crossing(SAMPLES) == pytest.approx(2000)  # half-way between 1/2 and 2 times as fast
    assert crossing(SAMPLES[:1]) is None
    assert crossing(SAMPLES[1:]) == 4000
    dip = [SAMPLES[1], {**SAMPLES[0], "tokens": 8000.0}, {**SAMPLES[1], "tokens": 32_000.0}]
    assert crossing(dip) == pytest.approx(16_000)  # from there on, not once before
