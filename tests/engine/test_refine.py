"""Refinement: budgets rise until recall suffices, runs resume, reports and commands are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext.cli import main
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import ConfigError, RequestError
from qwen1m_ext.events import Progress
from qwen1m_ext.refine import REPORT_FILE, RefineReport, refine
from qwen1m_ext.request import SamplingParams
from qwen1m_ext.sparse_config import (
    FILE_NAME,
    SparseSettings,
    load_sparse_config,
)
from qwen1m_ext.sparsity_report import draw, predicted_speed_up, report_lines

SETTINGS = SparseSettings(tile_tokens=64, window_tokens=384)
START = (31, 100)


def text(length: int, seed: int) -> tuple[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return f"text {seed}", torch.randint(0, 256, (length,), generator=generator).tolist()


TEXTS = [text(900, 1), text(1000, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refine")
    return write_checkpoint(directory, model_config(num_hidden_layers=3), gain=2.0)


def engine(checkpoint: Path, **options: Any) -> Engine:
    return Engine(checkpoint, max_model_len=1100, sparse_settings=SETTINGS, **options)


def run(checkpoint: Path, path: Path, threshold: float, **options: Any) -> RefineReport:
    return refine(
        engine(checkpoint, attention="sparse"), TEXTS, path, threshold=threshold,
        start=START, settings=SETTINGS, **options,
    )  # fmt: skip


def test_budgets_rise_until_recall_suffices(checkpoint: Path, tmp_path: Path) -> None:
    lows, highs = (
        run(checkpoint, tmp_path / f"{t}.json", t, max_passes=8) for t in (0.6, 0.9)
    )  # fmt: skip
    for report, threshold in ((lows, 0.6), (highs, 0.9)):
        assert report.finished and report.passes <= 8
        assert min(min(layer) for layer in report.recall) >= threshold
        assert min(min(layer) for layer in report.rows) > 0
        assert RefineReport.load(tmp_path / f"{threshold}.json") == report
    assert lows.budgets != highs.budgets and highs.budgets[0][0] != list(START)
    assert sum(map(sum, lows.columns)) < sum(map(sum, highs.columns))


def test_the_engine_measures_the_recall_that_was_refined(checkpoint: Path, tmp_path: Path) -> None:
    """The file written is the file read; other rows of the same texts give about that recall."""
    report = run(checkpoint, tmp_path / "r.json", 0.9, max_passes=8)
    report.config("refinement").save(tmp_path / FILE_NAME)
    fresh = engine(checkpoint, attention="sparse", sparse_config=tmp_path / FILE_NAME)
    loaded = load_sparse_config(tmp_path, fresh.config)
    assert loaded is not None
    assert [[[b.vertical_size, b.slash_size] for b in layer] for layer in loaded.layers] == (
        report.budgets
    )
    for _, ids in TEXTS:
        output = fresh.submit(ids[:-1], SamplingParams(temperature=0, max_tokens=1)).result()
        assert output.metrics.recall is not None and output.metrics.recall > 0.85


class _Stop(Exception):
    pass


def test_a_stopped_run_continues(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / REPORT_FILE
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if progress.total == 1000 and progress.done > 500:
            raise _Stop

    with pytest.raises(_Stop):
        run(checkpoint, path, 0.9, on_progress=stop)
    halfway = RefineReport.load(path)
    assert halfway.finished_texts == 1 and halfway.passes == 0 and not halfway.finished
    resumed: list[Progress] = []
    report = run(checkpoint, path, 0.9, max_passes=8, on_progress=resumed.append)
    assert resumed[0].total == 1000  # the second text, from its beginning
    whole = run(checkpoint, tmp_path / "whole.json", 0.9, max_passes=8)
    assert report.budgets == whole.budgets and report.recall == whole.recall
    assert run(checkpoint, path, 0.9).budgets == report.budgets  # finished: nothing is run
    with pytest.raises(ConfigError, match="expected a refinement with the same threshold"):
        run(checkpoint, path, 0.8)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="expected the fields of a refinement"):
        run(checkpoint, path, 0.9)
    assert seen and all(p.eta is not None and p.eta >= 0 for p in seen)


@pytest.mark.parametrize(
    ("texts", "threshold", "words"),
    [
        (TEXTS, 1.0, r"threshold: expected a number in \(0, 1\), got 1.0"),
        ([], 0.9, "texts: expected at least one"),
        ([("a", [1] * 1101)], 0.9, "text a: expected 2 to 1100 tokens, got 1101"),
    ],
)
def test_refusals(
    checkpoint: Path, tmp_path: Path, texts: Any, threshold: float, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        refine(engine(checkpoint), texts, tmp_path / "r.json", threshold=threshold)


def test_the_predicted_speed_up_is_the_ratio_of_pairs() -> None:
    layer = [[100.0, 300.0], [9e9, 9e9]]  # the last layer does not count
    report = RefineReport(0.9, {"window_tokens": 500}, [{"name": "x", "tokens": 1000}],
                          [[[1, 1]] * 2] * 2, [[1.0] * 2] * 2, [[1] * 2] * 2, layer)  # fmt: skip
    dca = engine_free_dual_chunk()
    dense = 1000 * 1001 / 2
    sparse = (100 * 101 / 2 + 900 * 100 + 300 * 301 / 2 + 700 * 300) / 2
    selection = 64 * (500 + 1000)
    assert predicted_speed_up(report, dca, 1000) == pytest.approx(dense / (sparse + selection))
    lines = list(report_lines(report, dca))
    assert lines[0].startswith("NOT FINISHED") and "requested rows only" in "\n".join(lines)


def engine_free_dual_chunk() -> Any:
    from qwen1m_ext.config import DualChunkConfig

    return DualChunkConfig(1000, 500, None)


def test_the_commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """refine, report with a picture, generate with what was written."""
    document = tmp_path / "document.txt"
    document.write_text("All the world's a stage, and all the men and women merely players. " * 9)
    out = tmp_path / "out"
    common = ["--model", str(checkpoint)]
    refining = ["sparsity", "refine", *common, "--text", str(document), "--tokens", "600",
                "--threshold", "0.5", "--start", "31,100", "--out", str(out), "-q"]  # fmt: skip
    assert main(refining) == 0
    assert {path.name for path in out.iterdir()} == {FILE_NAME, REPORT_FILE}
    assert "recall wanted: 0.5" in capsys.readouterr().out
    picture = tmp_path / "recall.png"
    assert main(["sparsity", "report", *common, "--dir", str(out), "--png", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "predicted speed-up" in text and picture.read_bytes().startswith(b"\x89PNG")
    generate = ["generate", *common, "--file", str(document), "--max-tokens", "2", "--ignore-eos",
                "--attention", "sparse", "--sparse-config", str(out / FILE_NAME)]  # fmt: skip
    assert main(generate) == 0
    assert ", sparse, recall " in capsys.readouterr().err
    assert json.loads((out / FILE_NAME).read_text())[0]["0"][0] == "vertical_and_slash"
    for arguments, words in (
        (["--tokens", "50"], "expected --text FILE or --haystacks N, got none"),
        (["--text", "/nowhere", "--tokens", "50"], "No such file"),
    ):
        assert main(["sparsity", "refine", *common, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_drawing_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from qwen1m_ext.errors import BackendError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"pip install 'qwen1m_ext\[plot\]'"):
        draw(RefineReport(0.9, {}, [], [], [[1.0]], [], [[1.0]]), tmp_path / "x.png")
