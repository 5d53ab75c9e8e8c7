"""Same output: a request gives the tokens that it gives alone, whatever else the engine does.

In float32 all of them. In bf16 a matrix product of another height changes the last bits, so two
logits that are nearly equal may change places: the first token that differs has to stand at a step
whose two best logits were less than `NEAR_TIE` apart when the request ran alone. What follows it is
another text and is not compared.

Each of `WAYS` answers all cases in one way in which an engine may come to them, and asserts that it
did come to them so (that somebody was preempted, that pages were reused).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.hold import held
from qwen1m_ext import SamplingParams
from qwen1m_ext.engine import Engine
from qwen1m_ext.handle import RequestHandle
from qwen1m_ext.haystack import make_sample
from qwen1m_ext.kv_cache import pages_for
from qwen1m_ext.ops import PAGE_SIZE
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.session_files import load_session, save_session
from qwen1m_ext.sessions import Session

NEAR_TIE = 0.05
"""Two logits closer than this may change places in bf16."""

FOLLOW_UP = list(b" Question: and why is that so?\nAnswer:")
"""What a second turn adds, in tokens of a byte-level tokenizer."""


@dataclass(frozen=True)
class Case:
    """A prompt and how much of an answer is wanted."""

    prompt: list[int]
    max_tokens: int
    noted: bool = True  # False: tokens only, which need not leave a GPU to be chosen

    @property
    def params(self) -> SamplingParams:
        """Greedy, with the two best tokens of every step."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            logprobs=2 if self.noted else None,
        )


def make_cases(tokens: list[int], max_tokens: int, seed: int = 0) -> list[Case]:
    """For each length: two questions about one text of it, and the first half of that text.

    The two questions share all but their last few tokens, at one length: they share pages under the
    temperature rule, too. The half has another length, so beyond the trained one it must not.
    Answers need one page more than their prompt.
    """

    def length(wanted: int) -> int:
        return pages_for(wanted) * PAGE_SIZE - max_tokens // 2

    cases = []
    for i, wanted in enumerate(tokens):
        texts = [
            make_sample(length(wanted), seed=seed + i, asked=asked, competing_keys=8).prompt
            for asked in (0, 1)
        ]
        texts.append(texts[0][: length(wanted // 2)])
        cases += [Case(list(text.encode()), max_tokens) for text in texts]
    return cases


@dataclass(frozen=True)
class Answer:
    """Output tokens; at each step the gap of the two best logits, and the chosen one's log prob."""

    tokens: list[int]
    gaps: list[float]
    logprobs: list[float]
    cached_tokens: int

    @staticmethod
    def of(output: RequestOutput) -> Answer:
        """From a finished request with `logprobs=2`; without, there are no gaps."""
        sample = output.outputs[0]
        gaps: list[float] = []
        own: list[float] = []
        if sample.logprobs is None:
            return Answer(sample.token_ids, gaps, own, output.num_cached_tokens or 0)
        for token, entries in zip(sample.token_ids, sample.logprobs, strict=True):
            best = sorted((e.logprob for e in entries.values()), reverse=True)
            gaps.append(best[0] - best[1])
            own.append(entries[token].logprob)
        return Answer(sample.token_ids, gaps, own, output.num_cached_tokens or 0)


@dataclass
class Setup:
    """An engine to be made: checkpoint, arguments, tokens of a prefill chunk when it is cut."""

    model_dir: Path
    options: dict[str, Any]
    small_chunk: int

    def engine(self, cases: list[Case], **more: Any) -> Engine:
        """Room for all cases and their second turns, unless `more` says otherwise."""
        room = sum(pages_for(len(c.prompt) + 3 * c.max_tokens) + 2 for c in cases) * PAGE_SIZE
        return Engine(self.model_dir, **{"max_model_len": room, **self.options, **more})


def alone(setup: Setup, cases: list[Case]) -> list[Answer]:
    """One after the other, whole chunks, nothing is reused: what all ways are compared with."""
    engine = setup.engine(cases, max_num_seqs=1, enable_prefix_caching=False)
    answers = [Answer.of(engine.submit(c.prompt, c.params).result()) for c in cases]
    assert not any(a.cached_tokens for a in answers)
    engine.shutdown()
    return answers


Way = Callable[[Setup, list[Case], list[Answer]], tuple[list[Answer], list[Answer]]]
"""(setup, cases, their answers alone) -> (answers, what they are to be like)."""


def _together(engine: Engine, cases: list[Case]) -> list[Answer]:
    with held(engine):
        handles = [engine.submit(c.prompt, c.params) for c in cases]
    answers = [Answer.of(handle.result()) for handle in handles]
    engine.shutdown()
    return answers


def batching(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """All at once: decodes beside chunks of prompts."""
    engine = setup.engine(cases, prefill_chunk_tokens=setup.small_chunk)
    answers = _together(engine, cases)
    assert engine.stats().steps_total < sum(c.max_tokens for c in cases)
    return answers, want


def speculation(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """The same with guesses that are checked together."""
    engine = setup.engine(cases, prefill_chunk_tokens=setup.small_chunk, speculative="ngram")
    handles = [engine.submit(c.prompt, c.params) for c in cases]
    outputs = [handle.result() for handle in handles]
    assert sum(o.metrics.accepted_tokens for o in outputs) > 0
    engine.shutdown()
    return [Answer.of(o) for o in outputs], want


def preemption(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """Pages for all prompts and no answer: some give way, and are computed anew."""
    room = sum(pages_for(len(c.prompt) + 1) for c in cases) * PAGE_SIZE
    engine = setup.engine(cases, max_model_len=room, enable_prefix_caching=False)
    answers = _together(engine, cases)
    assert engine.stats().preemptions_total > 0
    return answers, want


def prefix_reuse(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """Two rounds: the second finds its own pages; in the first, a second question the first's."""
    engine = setup.engine(cases)
    rounds = [
        [Answer.of(engine.submit(c.prompt, c.params).result()) for c in cases] for _ in range(2)
    ]
    engine.shutdown()
    assert any(a.cached_tokens for a in rounds[0])
    _assert_reused(setup, cases, rounds[1])
    return [*rounds[0], *rounds[1]], [*want, *want]


def resume(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """Each is cancelled in the middle of its prompt, and asked again."""
    engine = setup.engine(cases, prefill_chunk_tokens=setup.small_chunk)
    answers = []
    for case in cases:
        _cancel(engine, case, max(len(case.prompt) // 2, setup.small_chunk))
        answers.append(Answer.of(engine.submit(case.prompt, case.params).result()))
    engine.shutdown()
    _assert_reused(setup, cases, answers)
    return answers, want


def _assert_reused(setup: Setup, cases: list[Case], answers: list[Answer]) -> None:
    """Whoever has more than a chunk found the first one again."""
    long = [a for c, a in zip(cases, answers, strict=True) if len(c.prompt) > setup.small_chunk]
    assert long and all(a.cached_tokens for a in long)


def _cancel(engine: Engine, case: Case, after: int) -> None:
    handles: list[RequestHandle] = []
    submitted = threading.Event()

    def watch(progress: Any) -> None:
        submitted.wait()
        if progress.done > after:
            handles[0].cancel()

    handles.append(engine.submit(case.prompt, case.params, on_progress=watch))
    submitted.set()
    handles[0].wait()


def session_reload(setup: Setup, cases: list[Case], want: list[Answer]) -> Any:
    """A first turn, saved; another engine loads it for the second turn.

    Both are under the temperature of the first prompt, as single requests with it are. Of a sparse
    prompt within one window nothing is kept: those are left out.
    """
    kept = [len(c.prompt) > setup.small_chunk for c in cases]
    cases = [c for c, keep in zip(cases, kept, strict=True) if keep]
    want = [a for a, keep in zip(want, kept, strict=True) if keep]
    seconds = [
        Case([*c.prompt, *a.tokens, *FOLLOW_UP], c.max_tokens)
        for c, a in zip(cases, want, strict=True)
    ]

    def turn(engine: Engine, session: Session, case: Case) -> Answer:
        handle = engine.submit(case.prompt, case.params, session=session)
        answer = Answer.of(handle.result())
        handle.wait()
        return answer

    fresh = setup.engine(cases, max_num_seqs=1, enable_prefix_caching=False)
    expected = []
    for which in (cases, seconds):
        for first, case in zip(cases, which, strict=True):
            session = fresh.open_session(freeze_temperature=True)
            session.temperature = fresh.dual_chunk.temperature(len(first.prompt))
            expected.append(turn(fresh, session, case))
            session.close()
    fresh.shutdown()
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for step in (0, 1):
            engine = setup.engine(cases, enable_prefix_caching=False)
            for i, case in enumerate(seconds if step else cases):
                if step:
                    session = load_session(engine, Path(folder) / f"{i}.q1ms")
                else:
                    session = engine.open_session(freeze_temperature=True)
                answers.append(turn(engine, session, case))
                if not step:
                    save_session(engine, session, Path(folder), str(i))
                session.close()
            engine.shutdown()
    _assert_reused(setup, seconds, answers[len(cases) :])
    return answers, expected


WAYS: dict[str, Way] = {
    "batching": batching,
    "preemption": preemption,
    "prefix reuse": prefix_reuse,
    "resume after cancel": resume,
    "session reload by another engine": session_reload,
    "speculation": speculation,
}


@dataclass
class Report:
    """What a comparison found."""

    requests: int = 0
    steps: int = 0  # compared: up to the first difference
    near_ties: int = 0  # steps of the requests alone whose two best logits were near
    steps_alone: int = 0
    differing: int = 0  # requests with a token that differs
    widest_gap: float = 0.0  # where tokens differed, of the two best logits
    logprob_error: float = 0.0  # largest difference of a chosen token's log probability
    beyond: list[str] = field(default_factory=list)  # differences that no near-tie explains


def compare(answers: list[Answer], want: list[Answer], near_tie: float = NEAR_TIE) -> Report:
    """Hold answers against those that the requests give alone."""
    report = Report()
    for number, (got, single) in enumerate(zip(answers, want, strict=True)):
        assert len(got.tokens) == len(single.tokens)
        pairs = list(zip(got.tokens, single.tokens, strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        report.requests += 1
        report.steps += first
        report.steps_alone += len(pairs)
        report.near_ties += sum(gap < near_tie for gap in single.gaps)
        errors = zip(got.logprobs[:first], single.logprobs[:first], strict=bool(got.logprobs))
        report.logprob_error = max([report.logprob_error, *(abs(a - b) for a, b in errors)])
        if first < len(pairs):
            gap = single.gaps[first]
            report.differing += 1
            report.widest_gap = max(report.widest_gap, gap)
            if gap >= near_tie:
                a, b = pairs[first]
                report.beyond.append(
                    f"request {number}, step {first}: {a} in place of {b}, {gap:.3f} apart"
                )
    return report
