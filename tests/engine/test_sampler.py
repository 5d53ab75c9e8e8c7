"""Sampling: statistics against a float64 definition, order of the steps, seeds, logprobs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from qwen1m_ext.errors import RequestError, WeightsError
from qwen1m_ext.request import SamplingParams
from qwen1m_ext.sampler import Sampler, rank_tokens, with_texts

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.25, 1.25, -3.0, 0.75, -2.0])


def reference(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
) -> np.ndarray:
    """The distribution of the next token, in float64, one rule at a time."""
    z = logits.astype(np.float64).copy()
    for token, bias in (logit_bias or {}).items():
        z[token] += bias
    for token in set(prompt) | set(output):
        z[token] = z[token] / repetition_penalty if z[token] > 0 else z[token] * repetition_penalty
    for token in set(output):
        z[token] -= presence_penalty + frequency_penalty * output.count(token)
    p = np.exp(z / temperature - (z / temperature).max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    total = 0.0
    for i in order:
        if total >= top_p:
            p[i] = 0
        total += p[i]
    return p / p.sum()


CASES = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0, "top_k": 4},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.7},
    {"logit_bias": {3: 4.0, 0: -100.0}},
    {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "frequency_penalty": -0.7},
]


def with_history(
    params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> Sampler:
    sampler = Sampler(params, prompt)
    sampler._output.update(output)
    return sampler


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution_is_the_reference(case: dict[str, object]) -> None:
    prompt, output = (1, 2, 2, 9), (0, 2, 2, 5)
    sampler = with_history(SamplingParams(**case), prompt, output)  # type: ignore[arg-type]
    got = sampler.probabilities(sampler.adjust(LOGITS)).numpy()
    want = reference(LOGITS.numpy(), prompt=prompt, output=output, **case)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_distribution(case: dict[str, object]) -> None:
    """Chi-square of 4,000 draws; a wrong order of the rules or a biased draw fails by far."""
    sampler = Sampler(SamplingParams(seed=7, **case), (1,))  # type: ignore[arg-type]
    want = reference(LOGITS.numpy(), prompt=(1,), **case)  # type: ignore[arg-type]
    counts = np.zeros(VOCAB)
    for _ in range(4000):
        counts[sampler.sample(LOGITS)] += 1
        sampler._output.clear()  # the same distribution every time
    assert counts[want == 0].sum() == 0
    possible = want > 0
    if possible.sum() > 1:
        expected = want[possible] / want[possible].sum() * 4000
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


def test_greedy_and_its_penalties() -> None:
    assert Sampler(SamplingParams(temperature=0), ()).sample(LOGITS) == 0
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=1.0), ())
    assert [sampler.sample(LOGITS) for _ in range(4)] == [0, 1, 8, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), ())
    assert sampler.probabilities(LOGITS)[0] == 1


def test_a_token_may_be_banned_and_forced() -> None:
    banned = Sampler(SamplingParams(temperature=0, logit_bias={0: -1e6}), ())
    assert banned.sample(LOGITS) == 1
    forced = Sampler(SamplingParams(seed=1, logit_bias={9: 1e6}), ())
    assert {forced.sample(LOGITS) for _ in range(100)} == {9}


def test_nan_logits_are_refused() -> None:
    with pytest.raises(WeightsError, match="logits: expected numbers, got NaN"):
        Sampler(SamplingParams(), ()).sample(torch.full((VOCAB,), torch.nan))


def test_ties_of_top_k_and_top_p_keep_the_lower_id() -> None:
    flat = torch.zeros(VOCAB)
    sampler = Sampler(SamplingParams(top_k=3), ())
    assert sampler.probabilities(flat).nonzero()[:, 0].tolist() == [0, 1, 2]
    sampler = Sampler(SamplingParams(top_p=0.45), ())
    assert len(sampler.probabilities(flat).nonzero()) == 6


def test_min_tokens_suppresses_stop_tokens() -> None:
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), (), stop_token_ids=[0])
    assert [sampler.sample(LOGITS) for _ in range(3)] == [1, 1, 0]


def draws(seed: int | None, index: int = 0) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed), (), index=index)
    return [sampler.sample(LOGITS) for _ in range(40)]


def test_seeds() -> None:
    assert draws(3) == draws(3)
    streams = [draws(3), draws(4), draws(3, index=1), draws(-3), draws(None), draws(None)]
    for a, b in itertools.combinations(streams, 2):
        assert a != b


def test_top_logprobs() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    rows = [with_texts(row, None) for row in rank_tokens(logits, torch.tensor([9, 11]), 2)]
    want = torch.log_softmax(logits.double(), -1)
    assert list(rows[0]) == [9, 0, 1] and list(rows[1]) == [11, 10]
    assert rows[0][9].rank == 12 and rows[0][1].rank == 2 and rows[1][11].rank == 1
    for row, entries in enumerate(rows):
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(want[row, token]), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0),
     ("top_p", 1.01), ("top_k", -2), ("top_k", 2.5), ("min_p", 2), ("repetition_penalty", 0),
     ("presence_penalty", 3), ("frequency_penalty", -2.5), ("max_tokens", 0), ("n", 0),
     ("min_tokens", -1), ("min_tokens", 17), ("stop", ""), ("stop", ["a", 3]), ("seed", 1.5),
     ("seed", 1 << 63), ("logprobs", -1), ("prompt_logprobs", True), ("logit_bias", {"a": 1}),
     ("logit_bias", {3: float("nan")}), ("logit_bias", {3: float("inf")}), ("logit_bias", [3]),
     ("logit_bias", {True: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {3: 10**400}),
     ("stop", 5), ("stop", b"x"), ("stop_token_ids", 5), ("stop_token_ids", ["a"]),
     ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("ignore_eos", "no"),
     ("skip_special_tokens", None), ("include_stop_str_in_output", 1),
     ("temperature", 10**400), ("temperature", float("inf")), ("presence_penalty", -(10**400))],
)  # fmt: skip
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"{name}: expected"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
