"""Many requests at once on a real model: each gives the tokens that it gives alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lib.hold import PATIENCE, held, together
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import BackendError, RequestError, WeightsError
from qwen1m_ext.events import Event, Finished, OutputDelta, Progress
from qwen1m_ext.handle import RequestHandle
from qwen1m_ext.request import RequestOutput


def prompt_ids(length: int, seed: int) -> list[int]:
    return torch.randint(
        0, 256, (length,), generator=torch.Generator().manual_seed(1000 + seed)
    ).tolist()


def greedy(max_tokens: int = 20, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Callable[..., list[int]]:
    """What a prompt gives when nothing else runs and nothing is reused."""
    llm = LLM(
        checkpoint, max_model_len=1024, prefill_chunk_tokens=1024, enable_prefix_caching=False
    )

    def run(prompt: list[int], params: SamplingParams) -> list[list[int]]:
        output = llm.generate({"prompt_token_ids": prompt}, params)[0]
        return [sample.token_ids for sample in output.outputs]

    return run


@pytest.fixture
def engine(checkpoint: Path):
    """An engine whose pages do not suffice for all that the tests submit."""
    engine = Engine(checkpoint, max_model_len=1024, prefill_chunk_tokens=128, max_num_seqs=6)
    yield engine
    engine.shutdown(drain=False)
    allocator = engine.cache.allocator
    assert allocator.num_free == allocator.num_pages, "pages were lost"
    assert engine.stats().requests_running == engine.stats().requests_waiting == 0


def samples(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


def test_a_mixed_load_gives_what_each_request_gives_alone(engine: Engine, alone) -> None:
    """Lengths below and above the trained one and the chunk, n > 1, seeds, in 8 pages."""
    plan = [
        (prompt_ids(length, seed), params)
        for seed, (length, params) in enumerate(
            [
                (3, greedy(60)),
                (700, greedy(8)),
                (50, SamplingParams(n=3, seed=5, max_tokens=30, ignore_eos=True)),
                (130, greedy(40)),
                (64, greedy(40)),
                (300, SamplingParams(seed=1, max_tokens=10, ignore_eos=True)),
                (1, greedy(90)),
                (500, greedy(30, prompt_logprobs=0)),
                (400, greedy(300)),
                (400, greedy(300)),
            ]
        )
    ]
    with held(engine):
        handles = [engine.submit(prompt, params) for prompt, params in plan]
    for handle, (prompt, params) in zip(handles, plan, strict=True):
        output = handle.result()
        assert samples(output) == alone(prompt, params)
        if params.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(prompt)
    assert engine.stats().preemptions_total > 0


def test_recomputed_output_keeps_each_tokens_temperature(checkpoint: Path, engine: Engine) -> None:
    """Beyond the trained length s grows with every token, and preemption computes them again."""
    params = greedy(300, logprobs=0)
    fresh = LLM(checkpoint, max_model_len=1024, enable_prefix_caching=False)
    prompts = [prompt_ids(200, 30 + i) for i in range(4)]
    with held(engine):
        handles = [engine.submit(p, params) for p in prompts]
    for handle, prompt in zip(handles, prompts, strict=True):
        got, want = handle.result(), fresh.generate({"prompt_token_ids": prompt}, params)[0]
        assert samples(got) == samples(want)
        for a, b in zip(got.outputs[0].logprobs, want.outputs[0].logprobs, strict=True):
            (one,), (two,) = a.values(), b.values()
            assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
    assert engine.stats().preemptions_total > 1


def test_llm_generate_runs_prompts_together(checkpoint: Path, alone) -> None:
    llm = LLM(checkpoint, max_model_len=1024)
    prompts = [prompt_ids(length, length) for length in (5, 90, 200, 33)]
    with together(llm.engine, len(prompts)):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy())
    assert [samples(o) for o in outputs] == [alone(p, greedy()) for p in prompts]
    assert llm.engine.stats().steps_total < 30  # 4 x 20 tokens would be 80 one by one


def test_a_prefix_is_reused_and_reported(engine: Engine, alone) -> None:
    """A repeated prompt beyond the trained length hits; up to it any common beginning does."""
    prompt = prompt_ids(600, 1)
    for cached in (0, 512):
        output = engine.submit(prompt, greedy()).result()
        assert output.num_cached_tokens == cached
        assert samples(output) == alone(prompt, greedy())
    longer = [*prompt, 5]
    output = engine.submit(longer, greedy()).result()
    assert output.num_cached_tokens == 0 and samples(output) == alone(longer, greedy())


def test_a_common_beginning_below_the_trained_length(tmp_path: Path) -> None:
    from lib.checkpoints import model_config, write_checkpoint

    config = model_config(
        dual_chunk_attention_config={
            "chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 2048,
        }
    )  # fmt: skip
    directory = write_checkpoint(tmp_path, config, gain=2.0)
    fresh = LLM(directory, max_model_len=2048, enable_prefix_caching=False)
    llm = LLM(directory, max_model_len=2048)
    system = prompt_ids(400, 3)
    for question in ([], prompt_ids(150, 4), prompt_ids(740, 5)):
        request = {"prompt_token_ids": [*system, *question]}
        output, want = llm.generate(request, greedy())[0], fresh.generate(request, greedy())[0]
        assert samples(output) == samples(want)
        assert output.num_cached_tokens == (384 if question else 0)
        assert want.num_cached_tokens == 0
    turn = {"prompt_token_ids": [*request["prompt_token_ids"], *samples(output)[0], 1, 2]}
    assert llm.generate(turn, greedy())[0].num_cached_tokens == 1152  # 12 of the output


def test_a_cancelled_prefill_is_resumed(engine: Engine, alone) -> None:
    """An identical retry goes on at the last finished chunk."""
    prompt = prompt_ids(900, 7)
    seen: list[Progress] = []
    reached, cancelled = threading.Event(), threading.Event()

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.done > 300:
            reached.set()
            assert cancelled.wait(PATIENCE)  # while the chunk runs

    handle = engine.submit(prompt, greedy(), on_progress=watch)
    assert reached.wait(PATIENCE)
    handle.cancel()
    cancelled.set()
    assert handle.wait(PATIENCE) and seen[-1].done < 900
    events = list(handle.events())
    assert isinstance(events[-1], Finished) and events[-1].cancelled and not events[-1].error
    assert [e.finish_reason for e in events if isinstance(e, OutputDelta)] == ["abort"]
    assert handle.status().state == "finished"
    retry = engine.submit(prompt, greedy()).result()
    assert retry.num_cached_tokens >= 256 and retry.num_cached_tokens % 128 == 0
    assert samples(retry) == alone(prompt, greedy())
    assert engine.stats().cached_tokens_total == retry.num_cached_tokens


def test_cancelling_one_request_leaves_the_others_alone(engine: Engine, alone) -> None:
    prompts = [prompt_ids(150, 20 + i) for i in range(5)]
    cancelled = threading.Event()

    def wait_after_three(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert len(output) < 4 or cancelled.wait(PATIENCE)
        return logits

    handles = []
    for i, prompt in enumerate(prompts):
        processor = (lambda _: wait_after_three) if i == 2 else None
        handles.append(engine.submit(prompt, greedy(60), logits_processor=processor))
    stream = handles[2].outputs()
    for _ in range(3):
        next(stream)
    handles[2].cancel()
    cancelled.set()
    last = list(stream)[-1]
    assert last.finished and last.outputs[0].finish_reason == "abort"
    want = alone(prompts[2], greedy(60))[0]
    assert last.outputs[0].token_ids == want[: len(last.outputs[0].token_ids)]
    for i in (0, 1, 3, 4):
        assert samples(handles[i].result()) == alone(prompts[i], greedy(60))


def test_a_stop_is_exact_although_it_is_learnt_late(engine: Engine, alone) -> None:
    """A step planned beyond the stop leaves no token in the output nor in the session."""
    prompt = prompt_ids(20, 40)
    want = alone(prompt, greedy(30))[0]
    stop = want[10]
    first = want.index(stop)
    session = engine.open_session()
    params = greedy(30, stop_token_ids=[stop])
    handle = engine.submit(prompt, params, session=session)
    output = handle.result()
    assert output.outputs[0].token_ids == want[: first + 1]
    assert output.outputs[0].stop_reason == stop and handle.wait(PATIENCE)
    assert session.token_ids == prompt + want[:first]
    assert session.sequence.length == len(session.token_ids)
    session.close()


def test_requests_of_one_session_wait_for_each_other(engine: Engine, alone) -> None:
    session = engine.open_session()
    first = prompt_ids(30, 41)
    second = [*first, *alone(first, greedy(10))[0], 7]
    handles = [engine.submit(p, greedy(10), session=session) for p in (first, second)]
    outputs = [handle.result() for handle in handles]
    assert outputs[1].num_cached_tokens == len(second) - 2
    assert [samples(o) for o in outputs] == [alone(p, greedy(10)) for p in (first, second)]
    session.close()
    late = engine.submit(first, greedy(2), session=session)
    with pytest.raises(RequestError, match="session: expected an open one"):
        late.result()


def test_many_threads_submit_and_cancel(engine: Engine, alone) -> None:
    """64 requests from 8 threads: no stream is lost, mixed or left hanging."""
    prompts = [prompt_ids(5 + 17 * i, 60 + i) for i in range(8)]
    want = [alone(p, greedy(12))[0] for p in prompts]
    failures: list[str] = []

    def client(number: int) -> None:
        for turn in range(8):
            which = (number + turn) % 8
            handle = engine.submit(prompts[which], greedy(12))
            if turn % 3 == 2:
                handle.cancel()
            tokens = handle.result().outputs[0].token_ids
            expected = want[which][: len(tokens)] if turn % 3 == 2 else want[which]
            if tokens != expected:
                failures.append(f"client {number} turn {turn}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert sum(engine.stats().requests_finished.values()) == 64


def test_events_come_in_order(engine: Engine) -> None:
    events: list[Event] = []
    handle = engine.submit(prompt_ids(300, 80), greedy(5), on_event=events.append)
    assert handle.wait(PATIENCE)
    kinds = [type(event) for event in events]
    assert kinds == [Progress] * 6 + [OutputDelta] * 5 + [Finished]
    progress = [e for e in events if isinstance(e, Progress)]
    assert [p.done for p in progress] == sorted(p.done for p in progress)
    assert progress[-1].done == progress[-1].total == 300 and progress[-1].eta == 0
    last = events[-1]
    assert isinstance(last, Finished) and last.metrics.output_tokens == 5
    assert last.metrics.prefill_seconds > 0


def test_status_goes_through_its_states(engine: Engine) -> None:
    states: list[str] = []
    handles: list[RequestHandle] = []
    ready = threading.Event()

    def watch(event: Event) -> None:
        assert ready.wait(PATIENCE)
        states.append(handles[0].status().state)

    handles.append(engine.submit(prompt_ids(200, 81), greedy(5), on_event=watch))
    queued = engine.submit(prompt_ids(200, 82), greedy(2))
    assert queued.status().eta is not None and queued.status().total == 200
    ready.set()
    assert handles[0].wait(PATIENCE)
    assert states == sorted(states, key=["queued", "prefill", "decode", "finished"].index)
    assert {"prefill", "decode"} <= set(states) and handles[0].status().state == "finished"
    queued.result()


@pytest.mark.parametrize("kind", [Progress, OutputDelta])
def test_a_callback_that_raises_fails_its_request_only(engine: Engine, kind: type) -> None:
    class Oops(Exception):
        pass

    def bad(event: Event) -> None:
        if isinstance(event, kind):
            raise Oops

    handle = engine.submit(prompt_ids(200, 83), greedy(50), on_event=bad)
    fine = engine.submit(prompt_ids(150, 84), greedy(5))
    assert len(fine.result().outputs[0].token_ids) == 5 and handle.wait(PATIENCE)
    assert engine.stats().requests_finished == {"length": 1, "error": 1}


def test_a_broken_step_fails_its_requests_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.model, "logits", lambda hidden: torch.full((len(hidden), 260), torch.nan)
        )
        with pytest.raises(WeightsError, match="got NaN"):
            engine.submit(prompt_ids(20, 85), greedy()).result()
        patch.setattr(engine.model, "logits", lambda hidden: hidden.no_such_thing)
        handles = [engine.submit(prompt_ids(20, 86 + i), greedy()) for i in range(3)]
        for handle in handles:
            with pytest.raises(AttributeError):
                handle.result()
    assert len(engine.submit(prompt_ids(20, 89), greedy(5)).result().outputs[0].token_ids) == 5


def test_a_logits_processor_masks_each_sample(engine: Engine) -> None:
    """It sees its own sample's tokens; here sample i counts up from 10 i."""

    def make(index: int):
        def process(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            want = 10 * index + len(output)
            keep = logits[want].clone()
            logits[:] = -torch.inf
            logits[want] = keep
            return logits

        return process

    params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    output = engine.submit(prompt_ids(20, 90), params, logits_processor=make).result()
    assert samples(output) == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]


def test_pins_outlive_other_prompts(engine: Engine) -> None:
    pinned = prompt_ids(300, 91)
    engine.submit(pinned, greedy(1), request_id="book", pin=True).result()
    for i in range(4):
        engine.submit(prompt_ids(500, 92 + i), greedy(1)).result()
    assert engine.stats().pages_pinned == 2 and engine.stats().evictions_total > 0
    assert engine.submit(pinned, greedy(1)).result().num_cached_tokens == 256
    with pytest.raises(RequestError, match="pin: expected at most 4 pinned pages"):
        engine.submit(prompt_ids(600, 96), greedy(1), pin=True)
    assert engine.unpin("book") and not engine.unpin("book")


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown_drains_or_cancels(checkpoint: Path, drain: bool) -> None:
    engine = Engine(checkpoint, max_model_len=1024)
    requests = engine._core.requests
    with held(engine, lambda: drain or all(r.stopped for r in tuple(requests.values()))):
        handles = [engine.submit(prompt_ids(50, i), greedy(200)) for i in range(3)]
        engine.shutdown(drain)
    reasons = {handle.result().outputs[0].finish_reason for handle in handles}
    assert reasons == {"length" if drain else "abort"}
    assert all(handle.wait(0) for handle in handles)
    engine.shutdown()
    with pytest.raises(BackendError, match="shut down"):
        engine.submit([1], greedy())


def test_an_engine_that_nobody_holds_ends_its_threads(checkpoint: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(checkpoint, max_model_len=256)
    llm.generate({"prompt_token_ids": [1, 2]}, greedy(2))
    threads = set(threading.enumerate()) - before
    assert {t.name for t in threads} == {"qwen1m scheduler", "qwen1m runner", "qwen1m outputs"}
    weights = weakref.ref(llm.engine.model)
    del llm
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert weights() is None


def test_bad_engine_arguments(checkpoint: Path) -> None:
    for arguments in ({"max_num_seqs": 0}, {"short_share": 1.0}, {"max_itl_ms": 0.0}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Engine(checkpoint, **arguments)  # type: ignore[arg-type]


def test_a_request_id_is_used_once_at_a_time(engine: Engine) -> None:
    with held(engine):
        handle = engine.submit(prompt_ids(400, 97), greedy(50), request_id="mine")
        with pytest.raises(RequestError, match="request_id: expected a new one, got 'mine'"):
            engine.submit([1], greedy(), request_id="mine")
    handle.cancel()
    assert handle.wait(PATIENCE)
    assert engine.submit([1], greedy(3), request_id="mine").result().request_id == "mine"
