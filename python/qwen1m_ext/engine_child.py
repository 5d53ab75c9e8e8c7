"""The life of an engine's process: started, spoken to, replaced when it dies, given up at last.

The child is a fresh interpreter (no fork: neither torch's threads nor CUDA survive one) at the
other end of a socket. Whatever ends it, a crash, kill -9 or want of memory, ends the socket too, so
that it is known at once. One that lives but makes no progress (`heartbeat.py`) is killed. One that
dies again and again without having done anything is given up.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Literal

from .engine_messages import Batch, Beat, Call, Cancel, Facts, LoadFailed, Reply, Start
from .errors import BackendError
from .heartbeat import Silence, tick_seconds

log = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "restarting", "failed", "closed"]

MOST_EARLY_DEATHS = 3
"""So many deaths in a row, each early and before a request was completed, and it is given up."""

EARLY_SECONDS = 60.0
"""After it was loaded."""

PAUSE_SECONDS = 1.0
"""Before the second start in a row, twice that before the third."""

STACK_SECONDS = 0.5
"""A process that is stuck has so long to write where its threads are, before it is killed."""


class EngineChild:
    """One engine process after the other. Every method may be called from any thread."""

    def __init__(
        self,
        start: Start,
        command: Sequence[str],
        take: Callable[[Batch], None],
        lose: Callable[[str], None],
        on_state: Callable[[EngineState], None],
    ) -> None:
        """Start the first process and wait until it has loaded.

        Args:
            start: what to load.
            command: of the process; the number of its end of the socket is added, then the places
                where this process finds modules.
            take: given what the child tells, without the replies to calls.
            lose: told why, when a child is gone; nothing of it follows.
            on_state: told "restarting", "ready" and "failed" after the first load.

        Raises:
            What kept the engine from loading; BackendError: the process died meanwhile.
            ConfigError: the start's `timeout_seconds` is no time.
        """
        tick = tick_seconds(start.timeout_seconds)
        self.state: EngineState = "loading"
        self.failure: BaseException | None = None  # why there will be no engine any more
        self.restarts = 0
        self.completed = False  # set by the owner: this child has brought a request to its end
        self._start, self._command = start, command
        self._take, self._lose, self._on_state = take, lose, on_state
        self._lock, self._send_lock = threading.Lock(), threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[Connection, bytes] | None] = queue.SimpleQueue()
        self._connection: Connection | None = None  # of a child that is ready
        self._process: subprocess.Popen[bytes] | None = None
        self._silence = Silence(start.timeout_seconds)
        self._stuck: str | None = None  # why this child was killed
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._loaded_at: float | None = None
        self._loaded, self._closing = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, args=arguments, name=f"qwen1m {name}", daemon=True)
            for name, target, arguments in (
                ("engine", self._supervise, ()),
                ("sender", self._send_all, ()),
                ("watch", self._watch, (tick,)),
            )
        ]
        for thread in self._threads:
            thread.start()
        self._loaded.wait()
        if self.failure is not None:
            self.shutdown(drain=False)
            raise self.failure

    @property
    def facts(self) -> Facts:
        """What the last child has loaded."""
        return self._facts

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid if self._process else None

    def call(self, name: str, *arguments: Any) -> Any:
        """Have the child do something; raises what it raises, BackendError if it ends."""
        answer: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = answer
        try:
            self._send(Call(number, name, arguments))
            return answer.result()
        finally:
            with self._lock:
                del self._calls[number]

    def tell(self, message: Call | Cancel) -> None:
        """Send something; does not wait, neither for it to be read. Without a child it is void."""
        with contextlib.suppress(BackendError):
            self._send(message)

    def _send(self, message: Call | Cancel) -> None:
        with self._lock:
            connection = self._connection
        if connection is not None:
            self._outbox.put((connection, pickle.dumps(message)))
            return
        what = f"given up ({self.failure})" if self.failure else self.state
        raise BackendError(f"engine: expected one that is ready, got one that is {what}")

    def shutdown(self, drain: bool) -> None:
        """End the child, after what runs (`drain`) or at once. Idempotent."""
        if self.state == "ready":
            with contextlib.suppress(BackendError):  # it has ended by itself
                self.call("shutdown", drain)
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.kill()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()

    # --- the other threads ------------------------------------------------------------------------

    def _send_all(self) -> None:
        """A child that does not read, because it is stuck, holds up nobody but this thread."""
        while (entry := self._outbox.get()) is not None:
            connection, data = entry
            with contextlib.suppress(OSError), self._send_lock:  # it has gone: see `_gone`
                connection.send_bytes(data)

    def _watch(self, tick: float) -> None:
        """Kill a child that lives but is stuck."""
        while not self._closing.wait(tick):
            process = self._process
            if process is None or self._stuck is not None:
                continue
            if why := self._silence.look(tick):
                self._kill_stuck(process, why)

    def _kill_stuck(self, process: subprocess.Popen[bytes], why: str) -> None:
        with self._lock:
            if process is not self._process or self._stuck is not None:
                return
            self._stuck = f"{why} and was killed"
        log.error("engine: %s", why)
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STACK_SECONDS)
        process.kill()

    # --- the supervising thread -------------------------------------------------------------------

    def _supervise(self) -> None:
        early_deaths = 0
        while not self._closing.is_set():
            connection, process = self._spawn()
            error = self._serve(connection, process)
            with self._send_lock:
                connection.close()
            code = process.wait()
            with self._lock:
                self._process = None
            reason = f"its process ended {_how(code)}"
            if error is not None or self._stuck is not None:
                reason = str(error or self._stuck)
            if self._closing.is_set():
                break
            lasted = 0.0 if self._loaded_at is None else time.monotonic() - self._loaded_at
            early = lasted < EARLY_SECONDS and not self.completed
            early_deaths = early_deaths + 1 if early else 0
            if not self._loaded.is_set():
                self.failure = error or BackendError(f"engine: {reason} while it was being loaded")
            elif early_deaths >= MOST_EARLY_DEATHS:
                self.failure = BackendError(
                    f"engine: {reason}; {early_deaths} times in a row it has completed no request, "
                    "so it is not started again"
                )
            self._gone(reason)
            if self.failure is not None:
                break
            self.restarts += 1
            log.error("engine: %s; it is started again", reason)
            self._closing.wait(PAUSE_SECONDS * max(0, early_deaths - 1))
        if self.failure is None:
            self._gone("it was shut down")
        self._loaded.set()

    def _spawn(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen(
                [*self._command, str(number), *sys.path],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
            )
        self.completed, self._loaded_at = False, None
        with self._lock:
            self._process, self._stuck = process, None
            self._silence.begin()
            if self._closing.is_set():
                process.kill()
        return Connection(ours.detach()), process

    def _serve(
        self, connection: Connection, process: subprocess.Popen[bytes]
    ) -> BaseException | None:
        """Until the child ends; returns what kept it from loading."""
        try:
            connection.send(self._start)
            while isinstance(first := connection.recv(), Beat):
                self._silence.heard()
            if isinstance(first, LoadFailed):
                return first.error
            self._facts: Facts = first
            self._loaded_at = time.monotonic()
            with self._lock:
                self._connection = connection
            self._set_state("ready")
            self._loaded.set()
            while True:
                batch: Batch = connection.recv()
                self._silence.heard()
                self._take(batch)
                for item in batch.items:
                    if isinstance(item, Reply):
                        self._answer(item)
                    elif isinstance(item, Beat) and item.stuck is not None:
                        self._kill_stuck(process, f"its process is stuck: {item.stuck}")
        except (EOFError, OSError):
            return None

    def _answer(self, reply: Reply) -> None:
        with self._lock:
            answer = self._calls.get(reply.number)
        if answer is None:
            return
        if reply.error is not None:
            answer.set_exception(reply.error)
        else:
            answer.set_result(reply.value)

    def _gone(self, reason: str) -> None:
        """Everybody who waits for the child is told."""
        with self._lock:
            self._connection = None
            calls = list(self._calls.values())
        closing = self._closing.is_set()
        self._set_state("closed" if closing else "failed" if self.failure else "restarting")
        for answer in calls:
            if not answer.done():
                answer.set_exception(BackendError(f"engine: {reason}"))
        self._lose(reason)

    def _set_state(self, state: EngineState) -> None:
        before, self.state = self.state, state
        if before != "loading" and state != "closed":
            self._on_state(state)


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"with status {code}"
    with contextlib.suppress(ValueError):
        return f"by signal {-code} ({signal.Signals(-code).name})"
    return f"by signal {-code}"


DEFAULT_COMMAND = (
    sys.executable,
    "-c",  # not -m, which would look for modules in the working directory first
    "import sys; sys.path[:] = sys.argv[2:]; from qwen1m_ext.engine_worker import main; main()",
)
