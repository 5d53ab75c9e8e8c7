"""Stop strings across token borders, against a naive search; finish reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen1m_ext.output import OutputBuilder
from qwen1m_ext.request import SamplingParams
from qwen1m_ext.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def run(tokenizer: Tokenizer, ids: list[int], **params: object) -> tuple[OutputBuilder, list[str]]:
    sampling = SamplingParams(**{"max_tokens": 1000, **params})  # type: ignore[arg-type]
    builder = OutputBuilder(0, sampling, tokenizer, {258}, sampling.max_tokens or 0)
    shown = []
    for token in ids:
        builder.push(token)
        shown.append(builder.output.text)
        if builder.finished:
            break
    return builder, shown


@settings(max_examples=300)
@given(
    text=st.text(alphabet="abé", max_size=25),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
@example(text="aab", stops=["ab"], include=False)
@example(text="abc", stops=["b", "abc"], include=False)
def test_stop_strings_equal_a_naive_search(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    builder, shown = run(
        tokenizer, tokenizer.encode(text), stop=stops, include_stop_str_in_output=include
    )
    # naive: the first prefix of the text that contains a stop string, cut at the earliest one
    for end in range(len(text) + 1):
        hits = [(text[:end].find(s), -len(s), s) for s in stops if s in text[:end]]
        if hits:
            at, _, stop = min(hits)
            want = text[: at + len(stop) if include else at]
            assert (builder.output.text, builder.output.stop_reason) == (want, stop)
            assert builder.output.finish_reason == "stop"
            break
    else:
        assert not builder.finished
        want = text
    for piece in shown:  # what was shown on the way is never taken back
        assert want.startswith(piece)


def test_eos_and_stop_tokens(tokenizer: Tokenizer) -> None:
    builder, _ = run(tokenizer, [97, 258, 98])
    assert builder.output.token_ids == [97, 258]
    assert (builder.output.text, builder.output.finish_reason) == ("a", "stop")
    assert builder.output.stop_reason is None
    builder, _ = run(tokenizer, [97, 258, 98], ignore_eos=True)
    assert not builder.finished and builder.output.text == "ab"
    builder, _ = run(tokenizer, [97, 98, 99], stop_token_ids=[98])
    assert (builder.output.text, builder.output.stop_reason) == ("a", 98)
    builder, _ = run(tokenizer, [97, 258, 258], min_tokens=3)
    assert builder.output.token_ids == [97, 258, 258]


def test_length(tokenizer: Tokenizer) -> None:
    builder, _ = run(tokenizer, [97, 98, 99], max_tokens=2, stop="bx")
    assert (builder.output.text, builder.output.finish_reason) == ("ab", "length")
