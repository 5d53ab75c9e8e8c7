"""n-gram speculation on a device with a queue: what is said does not depend on it.

Most tests know what a run without speculation says and guess that, with a wrong token here and
there: so guesses of every length are right, wrong at once and wrong in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.capture import mapped
from lib.checkpoints import model_config, write_checkpoint
from lib.emulator import emulated_ops, library_path
from lib.hold import together
from lib.recording_device import RecordingDevice
from lib.same_output import Answer, compare
from qwen1m_ext import LLM, SamplingParams, assembly
from qwen1m_ext.decode_step import CHECK_SEQUENCES, CHECK_TOKENS, decode_shapes
from qwen1m_ext.device import CPU
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.sampler import Sampler
from qwen1m_ext.speculative import NgramSpeculator

OPTIONS: dict[str, Any] = {"max_model_len": 1024, "prefill_chunk_tokens": 100, "max_num_seqs": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * seed + i * i + 3 * i) % 250 for i in range(length)]


PROMPTS = [prompt(1 + 45 * i, i) for i in range(6)]


def queue_of(llm: LLM) -> RecordingDevice:
    assert isinstance(llm.engine.device, RecordingDevice)
    return llm.engine.device


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    """All at once."""
    with together(llm.engine, len(prompts)):
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)


def said(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


class Informed:
    """Guesses of somebody who knows the answers, and is wrong on purpose now and then."""

    def __init__(self, prompts: list[list[int]], outputs: list[RequestOutput]) -> None:
        self._known = [
            [*ids, *sample.token_ids]
            for ids, output in zip(prompts, outputs, strict=True)
            for sample in output.outputs
        ]
        self._turn = 0

    def guess(self, speculator: NgramSpeculator, tokens: list[int], room: int) -> list[int]:
        if speculator._pause:
            speculator._pause -= 1
            return []
        n = len(tokens)
        answer = next((known for known in self._known if known[:n] == tokens), tokens)
        turn, self._turn = self._turn, self._turn + 1
        draft = answer[n : n + min(room, (5, 7, 15, 1, 3, 2, 14)[turn % 7])]
        if draft and turn % 2:
            wrong = turn % 5 % len(draft)
            draft[wrong] = (draft[wrong] + 1) % 250
        return draft


@pytest.fixture
def informed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Informed]:
    def use(prompts: list[list[int]], outputs: list[RequestOutput]) -> Informed:
        guesses = Informed(prompts, outputs)
        monkeypatch.setattr(NgramSpeculator, "guess", lambda *a: guesses.guess(*a))
        return guesses

    return use


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> LLM:
    """Without speculation, on such a device: its seeds draw as those of `ops.sample` do."""
    return LLM(checkpoint, device=RecordingDevice(), cuda_graphs=False, **OPTIONS)


@pytest.fixture(scope="module")
def fast(checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **OPTIONS)
    yield llm
    assert queue_of(llm).spilled == 0, "the inputs of a step did not fit into what was planned"
    assert llm.engine.cache.allocator.num_free == llm.engine.cache.num_pages


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3, "n": 2},
        {"temperature": 0, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 1, "seed": 3, "n": 2},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "frequency_penalty": 0.9, "seed": 1},
        {"temperature": 0, "logprobs": 2},  # these come to the host
        {"temperature": 1, "seed": 4, "min_tokens": 9, "logit_bias": {7: 2.0}},
    ],
    ids=str,
)
def test_the_output_is_the_same(
    plain: LLM, fast: LLM, informed: Callable[..., Informed], params: dict[str, Any]
) -> None:
    """Six prompts for four places: checks share steps with chunks and with each other."""
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, **params)
    want = generate(plain, PROMPTS, sampling)
    informed(PROMPTS, want)
    got = generate(fast, PROMPTS, sampling)
    assert said(got) == said(want)
    drafted = sum(output.metrics.draft_tokens for output in got)
    accepted = sum(output.metrics.accepted_tokens for output in got)
    assert 10 < accepted < drafted - 10, "the checks have to accept and to refuse"
    if params.get("logprobs"):
        for a, b in zip(want, got, strict=True):
            assert [list(one or ()) for one in b.outputs[0].logprobs or ()] == [
                list(one or ()) for one in a.outputs[0].logprobs or ()
            ]


@pytest.mark.parametrize("stop", ["token", "text", "length"])
def test_a_sample_ends_inside_a_guess(
    plain: LLM, fast: LLM, informed: Callable[..., Informed], stop: str
) -> None:
    whole = generate(plain, PROMPTS[:1], GREEDY)
    tokens, text = whole[0].outputs[0].token_ids, whole[0].outputs[0].text
    params = {
        "token": SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[tokens[17]]),
        "text": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=text[20:23]),
        "length": SamplingParams(temperature=0, max_tokens=19, ignore_eos=True),
    }[stop]
    want = generate(plain, PROMPTS[:1], params)
    informed(PROMPTS[:1], whole)
    got = generate(fast, PROMPTS[:1], params)
    assert said(got) == said(want) and got[0].metrics.accepted_tokens > 0
    assert got[0].outputs[0].stop_reason == want[0].outputs[0].stop_reason


def test_preempted_and_back(checkpoint: Path, informed: Callable[..., Informed]) -> None:
    """Too few pages for all."""
    options = OPTIONS | {"max_model_len": 384, "max_num_seqs": 4, "cuda_graphs": False}
    params = SamplingParams(
        temperature=0.6, seed=2, max_tokens=100, frequency_penalty=0.7, ignore_eos=True
    )
    prompts = [prompt(100, i) for i in range(4)]
    want = generate(LLM(checkpoint, device=RecordingDevice(), **options), prompts, params)
    informed(prompts, want)
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **options)
    got = generate(llm, prompts, params)
    assert said(got) == said(want)
    assert llm.engine.stats().preemptions_total > 0
    assert sum(output.metrics.accepted_tokens for output in got) > 30


def test_a_session_keeps_what_was_said(
    plain: LLM, fast: LLM, informed: Callable[..., Informed]
) -> None:
    """Keys and values of guesses that were wrong are nobody's, those of the others are kept."""
    turns = []
    for llm in (plain, fast):
        session = llm.engine.open_session(freeze_temperature=True)
        ids = PROMPTS[0]
        answers = []
        for turn in range(3):
            if llm is fast:
                informed([ids], [turns[0][turn]])
            answers.append(llm.engine.submit(ids, GREEDY, session=session).result())
            ids = [*ids, *answers[-1].outputs[0].token_ids, 5, 6]
        session.close()
        turns.append(answers)
    assert said(turns[1]) == said(turns[0])
    assert [a.num_cached_tokens for a in turns[1]] == [a.num_cached_tokens for a in turns[0]]
    assert turns[1][2].metrics.accepted_tokens > 0


def test_masked_and_free_samples_share_a_check(
    plain: LLM, fast: LLM, informed: Callable[..., Informed]
) -> None:
    """One sample's rows come to the host to be masked, the other's are drawn on the device."""

    def even(index: int) -> Any:
        def mask(output: list[int], logits: Tensor) -> Tensor:
            logits[1::2] = -torch.inf
            return logits

        return mask

    results: list[list[RequestOutput]] = []
    for llm in (plain, fast):
        if llm is fast:
            informed(PROMPTS[:2], results[0])
        with together(llm.engine, 2):
            masked = llm.engine.submit(PROMPTS[0], GREEDY, logits_processor=even)
            free = llm.engine.submit(PROMPTS[1], GREEDY)
        results.append([masked.result(), free.result()])
    assert said(results[0]) == said(results[1])
    assert all(output.metrics.accepted_tokens > 0 for output in results[1])


def test_cancelled_with_a_check_under_way(
    plain: LLM, fast: LLM, informed: Callable[..., Informed]
) -> None:
    """The others go on, and its pages come back."""
    want = generate(plain, PROMPTS[:2], GREEDY)
    informed(PROMPTS[:2], want)
    with together(fast.engine, 2):
        first, second = (fast.engine.submit(ids, GREEDY) for ids in PROMPTS[:2])
    for output in second.outputs():
        if len(output.outputs[0].token_ids) == 9:
            second.cancel()
    assert said([first.result()]) == said(want[:1])
    first.wait()
    second.wait()
    assert fast.engine.stats().requests_running == 0


# --- what waits for what --------------------------------------------------------------------------


def steps_of(
    llm: LLM, prompts: list[list[int]], params: SamplingParams
) -> tuple[list[Any], Callable[[], Any]]:
    """Requests' sequences, and a function that runs their next step, here and now."""
    core = llm.engine._core
    sequences = []
    for ids in prompts:
        request = llm.engine._intake.request(ids, params)
        sequences += request.samples
        sequences[-1].sampler = Sampler(params, ids)
        sequences[-1].speculator = NgramSpeculator()
        core.scheduler.add(request)

    def step() -> Any:
        planned = core.scheduler.plan()
        assert planned is not None
        result = core.runner.run(planned)
        errors = [sequence.request.error for sequence in sequences]
        assert result.finish is not None and not any(errors), errors
        return result

    return sequences, step


@pytest.mark.parametrize(("length", "most"), [(18, 3), (70, 2)])
def test_checks_are_replayed(
    checkpoint: Path, plain: LLM, informed: Callable[..., Informed], length: int, most: int
) -> None:
    """Of one sequence, and of several at once: by the graphs of the shapes that they need.

    Beyond the trained length of 64 too, where the rows of a check have temperatures of their own.
    """
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **OPTIONS)
    scheduler = llm.engine._core.scheduler
    shapes = decode_shapes(4, speculative=True, chunk_tokens=104)
    assert {(n, t) for n, t in shapes if t > 1} == {(n, t) for n in (1, 2, 4) for t in CHECK_TOKENS}
    shapes.sort(key=lambda shape: shape[0] * shape[1])
    graphs = dict(zip(reversed(shapes), queue_of(llm).graphs, strict=True))
    for count in range(1, most + 1):
        before = {shape: graph.replays for shape, graph in graphs.items()}
        prompts = [prompt(length, 10 * count + i) for i in range(count)]
        want = generate(plain, prompts, GREEDY)
        informed(prompts, want)
        sequences, step = steps_of(llm, prompts, GREEDY)
        while not all(sequence.complete for sequence in sequences):
            result = step()
            result.finish()
            scheduler.retire(result.step, result.done, None)
        assert [[sequence.tokens[length:]] for sequence in sequences] == said(want)
        replayed = {shape for shape, graph in graphs.items() if graph.replays > before[shape]}
        size = 4 if count == 3 else count
        assert replayed & {(size, t) for t in CHECK_TOKENS}
        if count == 1:
            assert replayed >= {(1, t) for t in CHECK_TOKENS}
        for sequence in sequences:
            sequence.request.stop()
            scheduler.residency.cancel(sequence.request)
    assert llm.engine.cache.allocator.num_free == llm.engine.cache.num_pages


@pytest.mark.parametrize("seed", range(3))
def test_what_was_ahead_of_a_preemption_is_drawn_again(
    checkpoint: Path, plain: LLM, informed: Callable[..., Informed], seed: int
) -> None:
    """From the same positions of the stream, with counts that are made anew."""
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **OPTIONS)
    scheduler, ids = llm.engine._core.scheduler, prompt(30, seed)
    params = replace(GREEDY, temperature=1.0, frequency_penalty=0.7, seed=seed)
    want = generate(plain, [ids], params)
    informed([ids], want)
    [sequence], step = steps_of(llm, [ids], params)
    while not sequence.complete:
        if not sequence.preemptions and len(sequence.speculator.ahead) > 1:
            sequence.preempting = True
            scheduler.residency.settle(sequence)
            assert sequence.preemptions == 1 and sequence.speculator.ahead
        result = step()
        result.finish()
        scheduler.retire(result.step, result.done, None)
    assert sequence.preemptions == 1
    assert [[sequence.tokens[30:]]] == said(want)


def test_a_step_waits_only_for_a_guess(
    checkpoint: Path, plain: LLM, informed: Callable[..., Informed]
) -> None:
    """While guesses pause, steps are queued without their tokens; a check is waited for."""
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **OPTIONS)
    ids = prompt(20, 3)
    want = generate(plain, [ids], GREEDY)
    answer = want[0].outputs[0].token_ids
    informed([ids], want)
    [sequence], step = steps_of(llm, [ids], GREEDY)
    speculator = sequence.speculator
    speculator._pause = 2
    results = [step() for _ in range(3)]  # the prompt's, and two decodes
    assert sequence.tokens == ids, "nobody has asked for a token"
    assert not speculator.pauses
    results.append(step())  # with a guess
    assert sequence.tokens == [*ids, *answer[:3]]
    assert sequence.request.metrics.draft_tokens == 0, "the check is under way"
    speculator._pause = 1  # whatever it comes to
    results.append(step())
    assert sequence.request.metrics.draft_tokens > 0
    accepted = sequence.request.metrics.accepted_tokens
    assert accepted > 0 and speculator.covers(0) == (accepted > 1)
    assert sequence.tokens == [*ids, *answer[:5]]
    for result in results:
        result.finish()
        result.finish()  # again: nothing is taken twice
    assert sequence.tokens == [*ids, *answer[:5]]
    assert [token for r in results for _, token, _ in r.sampled] == answer[:5]


@pytest.mark.parametrize("count", [CHECK_SEQUENCES, CHECK_SEQUENCES + 1])
def test_many_that_decode_are_not_guessed_for(
    checkpoint: Path, plain: LLM, informed: Callable[..., Informed], count: int
) -> None:
    """Nor does anything wait for their tokens."""
    options = {**OPTIONS, "max_num_seqs": CHECK_SEQUENCES + 1}
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **options)
    prompts = [prompt(15, i) for i in range(count)]
    informed(prompts, generate(plain, prompts, GREEDY))
    sequences, step = steps_of(llm, prompts, GREEDY)
    results = [step() for _ in range(3)]
    guessed = count <= CHECK_SEQUENCES
    for sequence in sequences:
        assert (len(sequence.tokens) > 15) == guessed
        assert (sequence.request.metrics.draft_tokens > 0) == guessed
    for result in results:
        result.finish()


def test_looks_that_find_nothing_become_rare(checkpoint: Path) -> None:
    """Each has to wait for the step before."""
    llm = LLM(checkpoint, device=RecordingDevice(), speculative="ngram", **OPTIONS)
    ids = list(range(40))  # nothing comes twice
    [sequence], step = steps_of(llm, [ids], GREEDY)
    results, looks = [step()], []
    while len(results) < 25 and not sequence.request.metrics.draft_tokens:
        results.append(step())
        results[-3 if len(results) > 2 else 0].finish()  # two steps are under way
        if len(sequence.tokens) == len(ids) + len(results) - 1:
            looks.append(len(results))
    assert looks[:4] == [2, 4, 7, 12]
    for result in results:
        result.finish()


@pytest.mark.parametrize("queue", [False, True], ids=["cpu", "queue"])
def test_a_step_that_nobody_waits_for_still_says_what_was_ahead(
    checkpoint: Path, queue: bool
) -> None:
    """A prompt's chunk is abandoned; the token that another sample had ahead is not lost."""
    where = RecordingDevice() if queue else CPU
    options = OPTIONS | {"cuda_graphs": False}
    llm = LLM(checkpoint, device=where, speculative="ngram", **options)
    runner, scheduler = llm.engine._core.runner, llm.engine._core.scheduler
    requests = [llm.engine._intake.request(ids, GREEDY) for ids in (prompt(30, 1), prompt(90, 2))]
    for request in requests:
        sampler = Sampler(GREEDY, request.prompt)
        request.samples[0].sampler = sampler
        request.samples[0].speculator = NgramSpeculator()
    ahead = requests[0].samples[0]
    scheduler.add(requests[0])
    first = scheduler.plan()
    assert first is not None
    result = runner.run(first)
    if result.finish:
        result.finish()
    assert ahead.speculator is not None
    ahead.speculator.keep(0, 2, [(1, None), (2, None), (3, None)])
    scheduler.add(requests[1])
    planned = scheduler.plan()
    assert planned is not None and len(planned.pieces) == 2
    requests[1].on_progress = lambda progress: requests[1].stop()
    result = runner.run(planned)
    if result.finish:
        result.finish()
    assert result.sampled == [(ahead, 2, None)] and result.done == {ahead}
    assert result.seconds is None


# --- by the kernels of a GPU ----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["emu_sm90", "emu_sm80"])
def test_emulated_kernels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    informed: Callable[..., Informed],
    architecture: str,
) -> None:
    """Checks by emulated kernels, in bf16, captured and replayed."""
    if library_path() is None:
        pytest.skip("libqwen1m_emu_ops.so is not built (make test builds it)")
    config = model_config(
        hidden_size=128, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1,
        torch_dtype="bfloat16",
    )  # fmt: skip
    directory = write_checkpoint(tmp_path, config, gain=2.0, seed=3, dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "max_model_len": 256, "max_num_seqs": 1, "prefill_chunk_tokens": 100, "attention": "dense",
    }  # fmt: skip
    params, prompts = replace(GREEDY, max_tokens=12), [prompt(44, 1)]
    cpu = LLM(directory, device="cpu", **options)
    want = generate(cpu, prompts, replace(params, logprobs=2))
    load = assembly.load_weights  # what a GPU allocates is aligned, a mapped file is not
    monkeypatch.setattr(assembly, "load_weights", lambda *a: mapped(load(*a), torch.clone))
    informed(prompts, want)
    with emulated_ops(architecture):
        llm = LLM(directory, device=RecordingDevice(), speculative="ngram", **options)
        got = generate(llm, prompts, params)
        llm.engine.shutdown()
    shapes = sorted(decode_shapes(1, True, 101), key=lambda shape: -shape[0] * shape[1])
    graphs = zip(queue_of(llm).graphs, shapes, strict=True)
    assert sum(graph.replays for graph, (_, tokens) in graphs if tokens > 1) >= 2
    assert got[0].metrics.accepted_tokens > 0
    # near ties as in test_device.py
    report = compare([Answer.of(o) for o in got], [Answer.of(o) for o in want], near_tie=1.5)
    assert report.beyond == [] and report.steps >= 6, report
