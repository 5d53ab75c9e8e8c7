"""The engine in a process of its own: the same answers, and what happens when it is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import urllib.error

import openai
import pytest

from lib.server import PATIENCE, ServerProcess, wait_for
from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.engine_process import EngineProcess
from qwen1m_ext.errors import BackendError, ContextTooLong, RequestError
from qwen1m_ext.events import Finished, OutputDelta, Progress

PROMPT = "The old man looked at the sea and "
SMALL = ("--dtype", "float32", "--max-model-len", "32k", "--prefill-chunk-tokens", "512",
         "--keep-alive-seconds", "0.3", "--max-num-seqs", "4")  # fmt: skip
GREEDY = dict(model="demo_model", temperature=0)
ENGINE = dict(dtype="float32", max_model_len=4096)


@pytest.fixture(scope="module")
def engine():
    process = EngineProcess(demo_model_path(), timeout_seconds=PATIENCE, **ENGINE)
    yield process
    process.shutdown(drain=False)
    assert process.state == "closed"


@pytest.fixture(scope="module")
def llm():
    return LLM(demo_model_path(), **ENGINE)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, stop=["e "]),
    ],
)
def test_the_answers_are_those_of_an_engine_in_this_process(engine, llm, params):
    (expected,) = llm.generate(PROMPT, params)
    before = engine.stats().prompt_tokens_total
    handle = engine.submit(PROMPT, params)
    got = handle.result()
    assert [vars(o) for o in got.outputs] == [vars(o) for o in expected.outputs]
    assert got.prompt_logprobs == expected.prompt_logprobs
    assert (got.prompt, got.prompt_token_ids) == (PROMPT, expected.prompt_token_ids)
    assert handle.wait(PATIENCE) and handle.status().state == "finished"
    assert handle.status().output_tokens == sum(len(o.token_ids) for o in got.outputs)
    assert engine.stats().requests_running == 0
    assert engine.stats().prompt_tokens_total == before + len(expected.prompt_token_ids)


def test_events_come_in_order_and_a_cancel_ends_them(engine):
    seen = []
    third = threading.Event()

    def on_event(event):
        seen.append(event)
        if sum(isinstance(e, OutputDelta) for e in seen) == 3:
            third.set()

    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    handle = engine.submit("x", params, request_id="mine", on_event=on_event)
    with pytest.raises(RequestError, match="mine"):
        engine.submit("x", params, request_id="mine")
    assert third.wait(PATIENCE)
    handle.cancel()
    assert handle.wait(PATIENCE)
    assert isinstance(seen[0], Progress) and isinstance(seen[-1], Finished) and seen[-1].cancelled
    assert sum(isinstance(e, Finished) for e in seen) == 1
    assert engine.stats().pages_used == 0


def test_a_receiver_that_raises_fails_its_request_alone(engine):
    def on_event(event):
        if isinstance(event, OutputDelta):
            raise ZeroDivisionError("in the receiver")
        seen.append(event)

    seen: list = []
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    handle = engine.submit("x", params, on_event=on_event)
    assert handle.wait(PATIENCE)
    assert isinstance(seen[-1], Finished) and "in the receiver" in str(seen[-1].error)
    assert engine.submit("x", SamplingParams(max_tokens=1)).result().finished


def test_sessions_and_schemas_over_there(engine, llm, tmp_path):
    session = engine.open_session()
    params = SamplingParams(temperature=0, max_tokens=4)
    first = engine.submit(PROMPT, params, session=session)
    text = first.result().outputs[0].text
    assert first.wait(PATIENCE)
    cached, drawn = session.tokens()
    assert session.num_tokens == len(cached) and session.temperature == 1.0
    assert cached + drawn == [*first.prompt_token_ids, *engine.tokenizer.encode(text)]
    engine.save_session(session, tmp_path, "one")
    session.close()
    again = engine.load_session(tmp_path / "one.q1ms")
    follow = engine.submit(PROMPT + text + "then", params, session=again)
    result = follow.result()
    assert result.num_cached_tokens == len(cached)
    (expected,) = llm.generate(PROMPT + text + "then", params)
    assert result.outputs[0].token_ids == expected.outputs[0].token_ids
    assert follow.wait(PATIENCE)
    again.close()
    assert engine.submit("{", SamplingParams(max_tokens=2), json_schema={"type": "object"}).result()
    wait_for(lambda: engine.stats().pages_used == 0)


def test_refusals_cross_with_their_class(engine):
    with pytest.raises(ContextTooLong, match="4096"):
        engine.submit([1] * 5000)
    for bad in ([272], [-1], [1 << 40]):
        with pytest.raises(RequestError, match=rf"prompt_token_ids.*{bad[0]}"):
            engine.submit(bad)
    with pytest.raises(RequestError, match="response_format"):
        engine.submit("x", json_schema={"type": "nonsense"})
    with pytest.raises(OSError, match="nowhere"):
        engine.load_session(demo_model_path() / "nowhere.q1ms")
    with pytest.raises(RequestError, match="cached tokens"):
        engine.save_session(engine.open_session(), demo_model_path(), "empty")


WITH_A_BUG = textwrap.dedent(
    """
    from qwen1m_ext.engine_worker import main
    from qwen1m_ext.scheduler import Scheduler

    plan, steps = Scheduler.plan, []
    def broken(self):
        steps.append(1)
        if len(steps) > 20:
            raise ZeroDivisionError("a bug in the scheduler")
        return plan(self)
    Scheduler.plan = broken
    main()
    """
)


def test_an_engine_whose_threads_have_failed_ends_its_process(monkeypatch):
    """The request is told of the bug, and the process is replaced, or given up as it is here."""
    states: list[str] = []
    monkeypatch.setattr(EngineProcess, "command", (sys.executable, "-c", WITH_A_BUG))
    monkeypatch.setattr("qwen1m_ext.engine_child.MOST_EARLY_DEATHS", 1)
    monkeypatch.setattr("qwen1m_ext.engine_child.EARLY_SECONDS", float("inf"))
    engine = EngineProcess(demo_model_path(), on_state=states.append, **ENGINE)
    with pytest.raises(ZeroDivisionError, match="a bug in the scheduler"):
        engine.submit("x", SamplingParams(max_tokens=2000, ignore_eos=True)).result()
    wait_for(lambda: states == ["failed"])
    assert "status 70; 1 times in a row" in str(engine.failure)
    with pytest.raises(BackendError, match="given up"):
        engine.submit("x")
    engine.shutdown()


def refused(server, path: str, body=None) -> tuple[int, str, str | None]:
    """(status, error code, Retry-After) of what is expected to be refused."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.request("GET" if body is None else "POST", path, body)
    error = json.loads(caught.value.read())["error"]
    return caught.value.code, error["code"], caught.value.headers["Retry-After"]


def test_kill_9_in_a_decode_and_in_a_prefill(tmp_path):
    """Every client is told at once, the server stays, and another engine gives the same answers."""
    with ServerProcess(tmp_path / "log", *SMALL, holdable=True) as server:
        client = server.client()
        long = "x" * 20_000

        def answer() -> str:
            return client.completions.create(prompt=PROMPT, max_tokens=8, **GREEDY).choices[0].text

        expected = answer()
        server.post("/v1/sessions", {"id": "talk"})
        for phase in ("decode", "prefill"):
            first = server.engine_pid
            server.hold(2048)  # of the long prompts
            streamed = client.completions.create(
                prompt=PROMPT if phase == "decode" else long, max_tokens=9000, stream=True,
                **GREEDY, extra_body={"ignore_eos": True, "return_progress": True},
            )  # fmt: skip
            for chunk in streamed:
                progress = getattr(chunk, "prompt_progress", None)
                if phase == "decode" and chunk.choices:
                    break
                if phase == "prefill" and progress and 0 < progress["done"] < progress["total"]:
                    break
            trouble: dict[str, openai.APIError] = {}

            def rest(streamed=streamed, trouble=trouble) -> None:
                try:
                    list(streamed)
                except openai.APIError as error:
                    trouble["stream"] = error

            def whole(trouble=trouble) -> None:
                try:
                    server.client().completions.create(
                        prompt=long + "y", max_tokens=900, **GREEDY, extra_body={"ignore_eos": True}
                    )
                except openai.APIError as error:
                    trouble["whole"] = error

            for target in (rest, whole):
                threading.Thread(target=target, daemon=True).start()
            wait_for(lambda: len(server.get("/v1/requests")["data"]) == 2)
            server.hold("load")
            os.kill(first, signal.SIGKILL)
            wait_for(lambda trouble=trouble: len(trouble) == 2)
            assert "signal 9" in str(trouble["stream"])  # an event of the stream
            assert trouble["whole"].status_code == 503
            assert trouble["whole"].code == "engine_unavailable"
            assert int(trouble["whole"].response.headers["Retry-After"]) > 0
            # The server is there all the time and says what is going on.
            assert server.get("/health") == {"status": "restarting"}
            assert refused(server, "/ready")[:2] == (503, "restarting")
            status, code, retry_after = refused(server, "/v1/completions", {"prompt": "x"})
            assert (status, code) == (503, "restarting") and int(retry_after) > 0
            server.go_on()
            wait_for(lambda: server.get("/health") == {"status": "ok"})
            assert server.engine_pid != first
            assert answer() == expected
        assert refused(server, "/v1/sessions/talk")[:2] == (404, "session_lost")
        server.post("/v1/sessions", {"id": "talk"})  # its name is free
        assert server.metric("qwen1m:engine_restarts_total") == 2
        server.idle()

        # An engine that dies without ever completing anything is given up, with the reason.
        server.hold("load")
        last = None

        def given_up() -> bool:
            nonlocal last
            pid = server.engine_pid
            if pid is not None and pid != last:
                os.kill(pid, signal.SIGKILL)
                last = pid
            return server.process.poll() is not None

        wait_for(given_up)
        assert server.process.returncode == 2
        log = (tmp_path / "log").read_text()
        assert "signal 9 (SIGKILL); 3 times in a row" in log and "Traceback" not in log


def test_an_engine_does_not_outlive_its_server(tmp_path):
    with ServerProcess(tmp_path / "log", *SMALL) as server:
        pid = server.engine_pid
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_modules_of_the_working_directory_are_not_taken(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    process = EngineProcess(demo_model_path(), max_model_len=1024)
    assert process.submit("x", SamplingParams(max_tokens=1)).result().finished
    process.shutdown()
