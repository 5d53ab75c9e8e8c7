"""The parent of the server: which ends of its child it takes for a crash."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest

from qwen1m_ext import demo_model_path
from qwen1m_ext.server.app import create_app
from qwen1m_ext.server.settings import Settings

PARENT = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from qwen1m_ext.server.supervise import supervise

    lives, script = Path(sys.argv[1]), sys.argv[2].split(",")
    def serve():
        life = len(lives.read_text()) if lives.exists() else 0
        lives.write_text("x" * (life + 1))
        what = script[min(life, len(script) - 1)]
        if what.startswith("-"):
            os.kill(os.getpid(), int(what[1:]))
        return int(what)
    code = supervise(serve)
    assert "torch" not in sys.modules
    sys.exit(code)
    """
)


@pytest.mark.parametrize(
    ("script", "code", "lives"),
    [
        ("0", 0, 1),  # drained
        ("2", 2, 1),  # a bad checkpoint: again would be no better
        ("70,0", 0, 2),  # the engine has failed
        ("-9,-11,0", 0, 3),
        ("-9", 1, 3),  # dies as soon as it is started: given up
    ],
)
def test_what_is_started_again(tmp_path, script, code, lives):
    run = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path / "lives"), script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == code, run.stderr
    assert len((tmp_path / "lives").read_text()) == lives


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_ends_its_server(tmp_path):
    """A bug on an engine thread: the client hears of it, and the process asks to be replaced."""

    async def scenario():
        app, service = create_app(
            Settings(demo_model_path(), "demo", tmp_path, engine={"max_model_len": 1024})
        )
        crashed = asyncio.Event()
        service.on_crash = crashed.set
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.05)

                def broken():
                    raise ZeroDivisionError("a bug")

                service.engine._core.scheduler.plan = broken
                answer = await client.post("/v1/completions", json={"prompt": "x"}, timeout=20)
                assert answer.status_code == 500 and "a bug" in answer.text
                await asyncio.wait_for(crashed.wait(), 5)
                assert (await client.get("/health")).status_code == 503

    asyncio.run(scenario())
    ends = [t for t in threading.enumerate() if t.name.startswith("qwen1m ")]
    assert not any(t.is_alive() for t in ends)  # nothing is left that a process would wait for
