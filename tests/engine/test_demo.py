"""The shipped demo model: it retrieves, ends its answers, fails with plain RoPE, and reports."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.cli import main
from qwen1m_ext.haystack import is_correct, make_sample
from qwen1m_ext.refine import REPORT_FILE, RefineReport

SAMPLES = 8


def correct(llm: LLM, tokens: int, depth: float | None = None) -> int:
    count = 0
    for seed in range(SAMPLES):
        sample = make_sample(tokens, seed=seed, depth=depth)
        output = llm.generate(sample.prompt, SamplingParams(temperature=0, max_tokens=12))[0]
        count += is_correct(output.outputs[0].text, sample)
    return count


def test_files_fit_the_package() -> None:
    files = [path for path in demo_model_path().iterdir() if path.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "sparse_attention_config.json",
            "sparse_attention_report.json"} <= {path.name for path in files}  # fmt: skip
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_it_retrieves_at_its_length_and_beyond() -> None:
    """The measured accuracies are above 90 % (recipes/tiny); 5 of 8 leaves room for luck."""
    llm = LLM(demo_model_path(), max_model_len=8300)
    assert correct(llm, 2048) >= SAMPLES - 3
    assert correct(llm, 8192, depth=0.05) >= SAMPLES - 3


def test_plain_rope_fails_beyond_the_trained_length() -> None:
    """Facts that lie further back than the trained length; nearer ones it still finds."""
    llm = LLM(demo_model_path(), max_model_len=8300, rope="plain")
    assert correct(llm, 2048) >= SAMPLES - 3
    assert correct(llm, 8192, depth=0.05) <= 1


def test_the_answer_ends_by_itself() -> None:
    llm = LLM(demo_model_path(), max_model_len=2200)
    sample = make_sample(2048, seed=1)
    output = llm.generate(sample.prompt, SamplingParams(temperature=0, max_tokens=32))[0]
    assert output.outputs[0].finish_reason == "stop"


def test_the_command_reports(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "--tokens", "2k", "--seed", "1"])
    out = capsys.readouterr().out
    for word in ("seed      1", "question  What is the magic number of", "expected", "tokens",
                 "peak memory"):  # fmt: skip
        assert word in out
    assert status == (0 if "CORRECT" in out else 1)


def test_the_command_runs_plain_rope(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--tokens", "8k", "--seed", "1", "--rope", "plain"])
    distance = make_sample(8192, seed=1).distance
    out = capsys.readouterr().out
    assert f"{distance:,} tokens before its end" in out
    assert f"2,048 tokens of training; this fact lies {distance:,} back" in out


def test_the_budgets_are_those_of_a_finished_refinement() -> None:
    llm = LLM(demo_model_path(), max_model_len=256)
    report = RefineReport.load(demo_model_path() / REPORT_FILE)
    policy, sparse = llm.engine.policy, llm.engine.sparse
    assert report.finished and min(min(layer) for layer in report.recall) >= report.threshold
    assert policy.auto_tokens == 32_768 and asdict(policy.settings) == report.settings
    assert sparse is not None
    budgets = torch.stack([sparse.v_size, sparse.s_size], -1).tolist()
    assert budgets == report.budgets


def test_sparse_prefill_finds_what_dense_finds(capsys: pytest.CaptureFixture[str]) -> None:
    """Measured at 32k and beyond in recipes/tiny; here one of two answers may differ."""
    agreed = 0
    for seed in ("3", "4"):
        main(["demo", "--tokens", "8k", "--seed", seed, "--attention", "both"])
        out = capsys.readouterr().out
        assert "dense " in out and "sparse " in out and "recall" in out and "x as fast" in out
        agreed += "the same answer" in out
    assert agreed >= 1
