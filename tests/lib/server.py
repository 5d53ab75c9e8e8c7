"""A real `qwen1m serve` process for tests, and its official client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """Started by entering it, ready then; killed at the end if it has not ended by itself."""

    def __init__(self, log: Path, *arguments: str, key: str | None = None) -> None:
        self.port, self.log, self.key = free_port(), log, key
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "qwen1m_ext", "serve", "--port", str(self.port)]
        self._command += arguments + (("--api-key", key) if key else ())

    def __enter__(self) -> ServerProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server has ended: {self.log.read_text()[-3000:]}")
            try:
                self.get("/ready")
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"the server is not ready after 120 s: {self.log.read_text()[-3000:]}")

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

    @contextlib.contextmanager
    def engine_halted(self) -> Iterator[None]:
        """Within it the engine's process stands still, as if it computed for ever."""
        pid = self.engine_pid
        assert pid is not None, "there is no engine to halt"
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
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
        options = {"max_retries": 0, "timeout": 120} | options
        return OpenAI(base_url=self.url + "/v1", api_key=self.key or "none", **options)

    def metric(self, name: str) -> float:
        """Value of a metric without labels, or the sum over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        values = [line.split()[-1] for line in lines if line[len(name)] in " {"]
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def settled(self, name: str, value: float, seconds: float = 20) -> bool:
        """Whether a metric reaches a value in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric(name) == value:
                return True
            time.sleep(0.05)
        return False


def wait_for(predicate: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true value of a predicate; an AssertionError if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = predicate()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
