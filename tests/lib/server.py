"""A real `qwen1m serve` process for tests, and its official client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openai import OpenAI

ARGUMENTS = ("--dtype", "float32", "--max-model-len", "64k", "--prefill-chunk-tokens", "1024",
             "--keep-alive-seconds", "0.3", "--max-body-bytes", "2000000")  # fmt: skip
"""Of the server that most tests share."""


PATIENCE = 300.0
"""Seconds until a wait is given up. Only a broken server meets it, however slow the machine is."""

HOLDABLE = Path(__file__).with_name("held_engine_worker.py")


class ServerProcess:
    """Started by entering it, ready then; killed at the end if it has not ended by itself."""

    port: int
    url: str

    def __init__(
        self, log: Path, *arguments: str, key: str | None = None, holdable: bool = False
    ) -> None:
        """`holdable`: `hold` works, by a few lines of held_engine_worker.py in the engine."""
        self.log, self.key = log, key
        self._hold = log.with_suffix(".hold") if holdable else None
        self._command = [sys.executable, *([str(HOLDABLE)] if holdable else ["-m", "qwen1m_ext"])]
        self._command += ["serve", "--port", "0", "--engine-timeout-seconds", str(PATIENCE)]
        self._command += arguments
        self._command += ["--api-key", key] if key else []

    def __enter__(self) -> ServerProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        environment["QWEN1M_HOLD"] = str(self._hold)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server has ended: {self.log.read_text()[-3000:]}")
            if found := re.search(r" is ready at (http://\S+:(\d+)) ", self.log.read_text()):
                self.url, self.port = found[1], int(found[2])
                return self
            time.sleep(0.1)
        self.__exit__()
        raise AssertionError(f"the server is not ready: {self.log.read_text()[-3000:]}")

    def hold(self, what: int | str) -> None:
        """From now on no prompt gets beyond so many tokens, and while one waits nothing runs.

        "load": no engine begins to load; "watch": a silent one is not noticed. A cancelled request
        does not wait.
        """
        assert self._hold is not None, "the server was not started as holdable"
        new = self._hold.with_suffix(".new")
        new.write_text(str(what))
        new.replace(self._hold)

    def go_on(self) -> None:
        """The end of `hold`."""
        assert self._hold is not None, "the server was not started as holdable"
        self._hold.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, what: int | str) -> Iterator[None]:
        """`hold` within a block."""
        self.hold(what)
        try:
            yield
        finally:
            self.go_on()

    @property
    def engine_pid(self) -> int | None:
        """The process that computes; None while there is none."""
        pid = self.process.pid
        children: list[str] = []
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children += task.read_text().split()
        for child in children:
            with contextlib.suppress(OSError):
                if b"engine_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return None

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(self, method: str, path: str, body: Any = None, timeout: float = PATIENCE) -> Any:
        """JSON in, JSON out. Raises urllib.error.HTTPError for an error status."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        call = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(call, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text[:1] in b"{[" else text.decode()

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        return self.request("POST", path, {} if body is None else body)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def client(self, **options: Any) -> OpenAI:
        options = {"max_retries": 0, "timeout": PATIENCE} | options
        return OpenAI(base_url=self.url + "/v1", api_key=self.key or "none", **options)

    def metric(self, name: str) -> float:
        """Value of a metric without labels, or the sum over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        values = [line.split()[-1] for line in lines if line[len(name)] in " {"]
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def settled(self, name: str, value: float, seconds: float = PATIENCE) -> bool:
        """Whether a metric reaches a value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric(name) == value:
                return True
            time.sleep(0.05)
        return False

    def idle(self) -> None:
        """Wait until no request is left, and nothing that one held."""
        wait_for(lambda: self.get("/v1/requests")["data"] == [])
        assert self.settled("qwen1m:num_requests_running", 0)
        assert self.settled("qwen1m:num_requests_waiting", 0)


def wait_for(predicate: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of a predicate; an AssertionError if there is none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = predicate()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it has not happened")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
