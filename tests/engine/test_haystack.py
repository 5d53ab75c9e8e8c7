"""Haystacks: exact length, one place per fact, nothing of the training text, reproducible."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace

import pytest

from qwen1m_ext import demo_model_path
from qwen1m_ext.haystack import (
    KEY_WORDS,
    held_out_text,
    is_correct,
    make_sample,
    needle,
    question_prompt,
    train_text,
)
from qwen1m_ext.tokenizer import Tokenizer


@pytest.mark.parametrize("tokens", [1200, 2048, 8191, 32_768])
def test_prompts_have_exactly_the_length_asked_for(tokens: int) -> None:
    tokenizer = Tokenizer(demo_model_path())
    for seed in range(3):
        sample = make_sample(tokens, seed=seed)
        assert len(tokenizer.encode(sample.prompt)) == tokens


def test_every_fact_stands_once_and_the_question_asks_for_the_answer() -> None:
    for asked in range(20):
        sample = make_sample(4096, seed=5, asked=asked)
        key = sample.question.removeprefix("What is the magic number of ").removesuffix("?")
        assert sample.prompt.count(needle(key, sample.answer)) == 1
        assert sample.prompt.endswith(question_prompt(key))
        assert sample.prompt.count("The magic number of") == 21  # 20 facts and the question
        place = sample.prompt.index(needle(key, sample.answer)) / 4096
        assert abs(place - sample.depth) < 0.2


def test_questions_on_one_haystack_share_it() -> None:
    prompts = [make_sample(8192, seed=3, asked=i).prompt for i in range(20)]
    assert len(os.path.commonprefix(prompts)) > 8192 - 120
    assert len(set(prompts)) == 20


def test_keys_begin_differently_unless_alike_ones_are_asked_for() -> None:
    def beginnings(alike: bool) -> list[int]:
        prompts = (make_sample(4096, seed=seed, alike=alike).prompt for seed in range(20))
        found = (re.findall(r"magic number of (\w+) is \d", prompt) for prompt in prompts)
        return [len({key[:2] for key in keys}) for keys in found]

    assert set(beginnings(False)) == {20}
    assert min(beginnings(True)) < 20


def test_depth_is_where_the_fact_lies() -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(32_768, seed=1, depth=depth)
        at = sample.prompt.index(f"is {sample.answer}.")
        assert abs(at / 32_768 - depth) < 0.03 and sample.depth == depth


def test_a_seed_repeats_and_another_differs() -> None:
    assert make_sample(2048, seed=1) == make_sample(2048, seed=1)
    assert make_sample(2048, seed=1) != make_sample(2048, seed=2)


def test_any_length_of_text_can_be_had() -> None:
    text = held_out_text(1_200_000, random.Random(0))
    assert len(text) == 1_200_000 and text.isascii()


def test_keys_and_text_are_held_out() -> None:
    """No sentence of the haystack's source stands in the training text."""
    training = train_text()
    assert len(training) > 500_000
    text = held_out_text(100_000, random.Random(1))
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 60]
    assert sum(line in training for line in lines) < 0.02 * len(lines)
    assert len(KEY_WORDS) == len(set(KEY_WORDS))


@pytest.mark.parametrize(
    ("text", "correct"),
    [(" 12345.", True), ("12345", True), (" 123456", False), (" 1234", False), ("x 12345", False)],
)
def test_only_exactly_the_digits_count(text: str, correct: bool) -> None:
    sample = replace(make_sample(2048, seed=0), answer="12345")
    assert is_correct(text, sample) == correct


@pytest.mark.parametrize(
    "arguments", [{"depth": 1.5}, {"competing_keys": 0}, {"asked": 20}, {"tokens": 500}]
)
def test_bad_arguments_are_named(arguments: dict[str, float]) -> None:
    values = {"tokens": 2048, **arguments}
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        make_sample(values.pop("tokens"), seed=0, **values)  # type: ignore[arg-type]
