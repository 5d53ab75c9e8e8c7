"""An engine that lives but does not get on is replaced, as one that died."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading

import openai
import pytest

from lib.server import ServerProcess, wait_for
from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.engine_process import EngineProcess
from qwen1m_ext.errors import BackendError, ConfigError

SMALL = ("--dtype", "float32", "--max-model-len", "32k", "--engine-timeout-seconds", "10")
GREEDY = dict(model="demo_model", prompt="Once upon a time", temperature=0)


def test_a_stopped_process(tmp_path):
    """SIGSTOP: the server answers meanwhile, then everybody is told and another process starts."""
    with ServerProcess(tmp_path / "log", *SMALL, holdable=True) as server:
        client = server.client()
        expected = client.completions.create(**GREEDY, max_tokens=8).choices[0].text
        streamed = client.completions.create(
            **GREEDY, max_tokens=30_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(streamed))
        first = server.engine_pid
        server.hold("watch")
        os.kill(first, signal.SIGSTOP)
        trouble = {}

        def rest() -> None:
            try:
                list(streamed)
            except openai.APIError as error:
                trouble["stream"] = error

        def new() -> None:  # more than the socket takes: its sender has to wait
            try:
                tokens = [1] * 30_000
                server.client().completions.create(**GREEDY | {"prompt": tokens}, max_tokens=8)
            except openai.APIError as error:
                trouble["new"] = error

        for _ in range(4):
            threading.Thread(target=new, daemon=True).start()
        threading.Thread(target=rest, daemon=True).start()
        wait_for(lambda: len(server.get("/v1/requests")["data"]) == 5)
        for entry in server.get("/v1/requests")["data"][1:3]:  # cancelling does not wait either
            server.delete(f"/v1/requests/{entry['id']}")
        server.go_on()
        wait_for(lambda: len(trouble) == 2)
        assert "no sign of life" in str(trouble["stream"])
        assert trouble["new"].status_code == 503 and trouble["new"].code == "engine_unavailable"
        wait_for(lambda: server.get("/health") == {"status": "ok"})
        assert not os.path.exists(f"/proc/{first}") and server.engine_pid != first
        assert client.completions.create(**GREEDY, max_tokens=8).choices[0].text == expected
        assert server.metric("qwen1m:engine_restarts_total") == 1
        server.idle()


ENDLESS = textwrap.dedent(
    """
    from qwen1m_ext.engine_worker import main
    from qwen1m_ext.{module} import {owner}

    def endless(*_):
        while True:
            pass
    assert hasattr({owner}, "{method}")
    {owner}.{method} = endless
    main()
    """
)


@pytest.mark.parametrize(
    ("module", "owner", "method", "who"),
    [
        ("step_result", "StepResult", "sample", "model runner"),
        ("scheduler", "Scheduler", "retire", "scheduler"),
        ("output", "OutputBuilder", "push", "output processor"),
    ],
)
def test_an_endless_loop(monkeypatch, capfd, module, owner, method, who):
    """Whichever thread is in it; the stacks say where."""
    code = ENDLESS.format(module=module, owner=owner, method=method)
    monkeypatch.setattr(EngineProcess, "command", (sys.executable, "-c", code))
    engine = EngineProcess(demo_model_path(), timeout_seconds=8.0, max_model_len=1024)
    with pytest.raises(BackendError, match=f"stuck: its {who} made no progress for .* s and was"):
        engine.submit("x", SamplingParams(max_tokens=8, ignore_eos=True)).result()
    engine.shutdown()
    assert "in endless" in capfd.readouterr().err


def test_a_timeout_that_is_none():
    with pytest.raises(ConfigError, match="engine_timeout_seconds"):
        EngineProcess(demo_model_path(), timeout_seconds=0.0)
