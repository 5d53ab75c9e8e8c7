"""Sessions: what is reused, what must not be, and that reuse changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.events import Progress
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.sessions import Session

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def turn(llm: LLM, session: Session, prompt: list[int]) -> RequestOutput:
    *_, last = llm.stream({"prompt_token_ids": prompt}, GREEDY, session=session)
    return last


def alone(llm: LLM, prompt: list[int]) -> list[int]:
    return llm.generate({"prompt_token_ids": prompt}, GREEDY)[0].outputs[0].token_ids


@pytest.fixture
def session(llm: LLM) -> Session:
    session = llm.open_session()
    yield session
    session.close()
    assert llm.engine.cache.allocator.num_free == llm.engine.cache.num_pages


def test_turns_reuse_the_common_prefix_exactly(llm: LLM, session: Session) -> None:
    """Up to the trained length (64): prompt and output of the first turn are cached."""
    first = list(range(20))
    output = turn(llm, session, first)
    assert output.metrics.cached_tokens == 0
    answer = output.outputs[0].token_ids
    second = [*first, *answer, 200, 201]
    output = turn(llm, session, second)
    assert output.metrics.cached_tokens == len(first) + len(answer) - 1  # the last never ran
    assert output.outputs[0].token_ids == alone(llm, second)
    changed = [*first[:10], 99, *second[11:]]
    output = turn(llm, session, changed)
    assert output.metrics.cached_tokens == 10
    assert output.outputs[0].token_ids == alone(llm, changed)


def test_a_repeated_prompt_runs_its_last_token_only(llm: LLM, session: Session) -> None:
    prompt = list(range(300))[::-1]
    prompt = [t % 256 for t in prompt]
    turn(llm, session, prompt)
    output = turn(llm, session, prompt)
    assert output.metrics.cached_tokens == 299
    assert output.outputs[0].token_ids == alone(llm, prompt)


def test_beyond_the_trained_length_another_length_is_computed_anew(
    llm: LLM, session: Session
) -> None:
    """s(n) differs with n there, and with it every cached key of the deeper layers."""
    prompt = [t % 256 for t in range(200)]
    answer = turn(llm, session, prompt).outputs[0].token_ids
    longer = [*prompt, *answer, 7]
    output = turn(llm, session, longer)
    assert output.metrics.cached_tokens == 0
    assert output.outputs[0].token_ids == alone(llm, longer)


def test_frozen_temperature_reuses_beyond_the_trained_length(llm: LLM) -> None:
    """It equals one request computed with the first turn's s throughout."""
    prompt = [t % 256 for t in range(200)]
    frozen = llm.open_session(freeze_temperature=True)
    answer = turn(llm, frozen, prompt).outputs[0].token_ids
    longer = [*prompt, *answer, 7, 8]
    output = turn(llm, frozen, longer)
    assert output.metrics.cached_tokens == 205
    fresh = llm.open_session(freeze_temperature=True)
    fresh.temperature = llm.engine.dual_chunk.temperature(len(prompt))
    assert turn(llm, fresh, longer).outputs[0].token_ids == output.outputs[0].token_ids
    frozen.close()
    fresh.close()


def test_a_cancelled_prefill_goes_on_from_its_complete_chunks(llm: LLM, session: Session) -> None:
    class Stop(Exception):
        pass

    def cancel(progress: Progress) -> None:
        if progress.done > 250:
            raise Stop

    prompt = torch.randint(0, 256, (350,), generator=torch.Generator().manual_seed(1)).tolist()
    stream = llm.stream({"prompt_token_ids": prompt}, GREEDY, session=session, on_progress=cancel)
    with pytest.raises(Stop):
        next(stream)
    output = turn(llm, session, prompt)
    assert output.metrics.cached_tokens == 200  # chunks of 100; the third was not complete
    assert output.outputs[0].token_ids == alone(llm, prompt)


def test_several_samples_leave_a_usable_session(llm: LLM, session: Session) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True)
    prompt = list(range(30))
    *_, output = llm.stream({"prompt_token_ids": prompt}, params, session=session)
    last = output.outputs[2].token_ids
    follow = [*prompt, *last, 5]
    output = turn(llm, session, follow)
    assert output.metrics.cached_tokens == len(prompt) + 5
    assert output.outputs[0].token_ids == alone(llm, follow)


def test_prompt_logprobs_compute_every_row(llm: LLM, session: Session) -> None:
    turn(llm, session, list(range(20)))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    *_, output = llm.stream({"prompt_token_ids": list(range(20))}, params, session=session)
    assert output.metrics.cached_tokens == 0
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 20


def test_closing_twice_is_harmless(checkpoint: Path) -> None:
    llm = LLM(checkpoint, max_model_len=256)
    session = llm.open_session()
    session.close()
    session.close()
    assert len({llm.open_session().sequence.row for _ in range(8)}) == 8
