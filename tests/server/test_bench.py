"""`qwen1m bench`: counts and arithmetic are right, and the keys are those that dashboards read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen1m_ext.benchmark.serve import Timing, summarise
from qwen1m_ext.benchmark.summary import percentile
from qwen1m_ext.cli import main

KEYS = [f"{statistic}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99")]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).exponential(size=count)
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(list(values), percent) == pytest.approx(np.percentile(values, percent))


def test_a_known_run():
    timings = [
        Timing(ttft=0.1, itl=[0.02, 0.04], latency=0.16, prompt_tokens=10, output_tokens=3),
        Timing(ttft=0.3, itl=[0.06], latency=0.36, prompt_tokens=20, output_tokens=2),
        Timing(error="503", ttft=9.0),
    ]
    result = summarise(timings, duration=2.0)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 5)
    assert (result["request_throughput"], result["output_throughput"]) == (1.0, 2.5)
    assert result["total_token_throughput"] == 17.5
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["mean_itl_ms"] == pytest.approx(40)
    assert result["mean_tpot_ms"] == pytest.approx((30 + 60) / 2)
    assert result["mean_e2el_ms"] == pytest.approx(260)


def test_serve_on_a_real_server(server, tmp_path, capsys):
    output = tmp_path / "serve.json"
    code = main(
        ["bench", "serve", "--url", server.url, "--num-prompts", "6", "--max-concurrency", "3",
         "--input-len", "150", "--output-len", "5", "--request-rate", "50", "-o", str(output)]
    )  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (900, 30)
    assert all(result[key] >= 0 for key in KEYS) and set(KEYS) <= set(result)
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]
    assert result["run"]["qwen1m_ext"] and result["run"]["cpu"]
    assert "median_ttft_ms" in capsys.readouterr().out


def test_serve_says_why_it_cannot(server, capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers" in capsys.readouterr().err
    arguments = ["bench", "serve", "--url", server.url, "--num-prompts", "2", "--input-len", "8"]
    assert main([*arguments, "--output-len", "100k"]) == 1  # more than the context
    assert "context length" in capsys.readouterr().out
    assert main([*arguments, "--request-rate", "0"]) == 2


def test_prefill_and_decode(tmp_path):
    output = tmp_path / "out.json"
    assert main(["bench", "prefill", "--input-len", "64", "256", "-o", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["input_len"] for row in rows] == [64, 256]
    assert all(len(row["all_ttft_ms"]) == 3 and row["ttft_ms"] > 0 for row in rows)
    arguments = ["--input-len", "32", "--batch", "1", "3", "--output-len", "4", "-o", str(output)]
    assert main(["bench", "decode", *arguments]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["median_tpot_ms"] > 0 for row in rows)
