"""The child of `EngineProcess`: an `Engine` at the other end of a socket.

One thread receives, the main thread sends: what the engine's threads produce in the meantime goes
out as one message. Calls run on a few threads, so that none waits for another's file or grammar. A
last one is the heart: it tells whether the others get on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .engine import Engine
from .engine_messages import (
    TOKEN_ARRAY,
    Batch,
    Beat,
    Call,
    Cancel,
    Facts,
    Item,
    LoadFailed,
    Released,
    Reply,
    SessionState,
    Start,
    Submit,
    portable,
)
from .events import Event, Finished
from .handle import RequestHandle
from .heartbeat import tick_seconds
from .session_files import SessionInfo, load_session, save_session
from .sessions import Session

log = logging.getLogger(__name__)

CRASHED = 70
"""Exit status after the engine's threads have ended in an error (EX_SOFTWARE)."""

STATE_SECONDS = 0.05
"""So often the parent is told how things stand while requests run."""

WORKERS = 4


class Worker:
    """Serves one engine until the parent's end of the socket closes."""

    def __init__(self, connection: Connection) -> None:
        """`connection` to the parent, which has sent `Start`."""
        self._connection = connection
        self._outbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._handles: dict[str, RequestHandle] = {}
        self._sessions: dict[int, Session] = {}
        self._pool = ThreadPoolExecutor(WORKERS, "qwen1m-calls")
        self._first = threading.Lock()  # of what is sent before and with the end of the loading
        self._loaded = False
        self._calls: dict[str, Callable[..., Any]] = {
            "submit": self._submit,
            "unpin": lambda request_id: self._engine.unpin(request_id),
            "open_session": self._open_session,
            "close_session": self._close_session,
            "session_tokens": self._session_tokens,
            "save_session": self._save_session,
            "load_session": self._load_session,
            "shutdown": lambda drain: self._engine.shutdown(drain),
        }

    def run(self) -> None:
        """Load, say so, and serve. Does not return."""
        start: Start = self._connection.recv()
        timeout = start.timeout_seconds
        threading.Thread(target=self._receive, name="qwen1m receiver", daemon=True).start()
        threading.Thread(target=self._beat, args=(timeout,), name="heart", daemon=True).start()
        try:
            self._engine = engine = Engine(start.model_dir, **start.arguments)
        except Exception as error:
            with self._first:
                self._connection.send(LoadFailed(portable(error)))
            return
        facts = Facts(
            config=engine.config,
            generation_config=engine.generation_config,
            dual_chunk=engine.dual_chunk,
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
            eos_token_ids=engine.eos_token_ids,
            prefill=engine.policy.describe(),
        )
        with self._first:
            self._connection.send(facts)
            self._loaded = True
        self._send()

    # --- receiving --------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Cancel):
                    if handle := self._handles.get(message.request_id):
                        handle.cancel()
                else:
                    self._pool.submit(self._answer, message)
        except (EOFError, OSError):
            os._exit(1)  # nobody is left to work for, whatever the threads are doing

    def _answer(self, call: Call) -> None:
        try:
            reply = Reply(call.number, self._calls[call.name](*call.arguments))
        except BaseException as error:
            reply = Reply(call.number, error=portable(error))
        self._outbox.put(reply)

    # --- sending ----------------------------------------------------------------------------------

    def _beat(self, timeout: float) -> None:
        tick = tick_seconds(timeout)
        with contextlib.suppress(OSError):  # the parent has gone
            while True:
                time.sleep(tick)
                with self._first:
                    if self._loaded:
                        break
                    self._connection.send(Beat(None))
        observer = self._engine.observer(timeout)
        while True:  # by the way of everything else: it must be open
            self._outbox.put(Beat(observer.look(tick)))
            time.sleep(tick)

    def _send(self) -> None:
        told = 0.0
        while True:
            items = []
            with contextlib.suppress(queue.Empty):
                items.append(self._outbox.get(timeout=STATE_SECONDS if self._handles else None))
            items += self._rest()
            stats = statuses = None
            settled = any(isinstance(item, Reply | Released) for item in items)
            if settled or time.monotonic() - told >= STATE_SECONDS:
                told = time.monotonic()
                stats, statuses = self._engine.stats(), self._engine.statuses()
            self._connection.send(Batch(items, stats, statuses))
            if self._engine.failure is not None and not self._handles:
                log.error("the engine has failed", exc_info=self._engine.failure)
                self._pool.shutdown()  # calls under way have their answers
                self._connection.send(Batch(self._rest(), None, None))
                os._exit(CRASHED)

    def _rest(self) -> list[Item]:
        """What is in the outbox now."""
        items = []
        while not self._outbox.empty():
            items.append(self._outbox.get())
        return items

    # --- calls ------------------------------------------------------------------------------------

    def _submit(self, message: Submit) -> None:
        name = message.request_id
        session = None if message.session is None else self._sessions[message.session]

        def on_event(event: Event) -> None:
            if isinstance(event, Finished):
                self._tell_session(message.session)  # its temperature is known
                if event.error is not None:
                    event = replace(event, error=portable(event.error))
            self._outbox.put((name, event))

        placed = threading.Event()  # the handle, below

        def on_release() -> None:
            placed.wait()
            handle = self._handles.pop(name)
            self._tell_session(message.session)
            self._outbox.put(Released(name, handle.status()))

        self._handles[name] = self._engine.submit(
            message.token_ids.tolist(),
            message.params,
            prompt_text=message.prompt_text,
            priority=message.priority,
            request_id=name,
            session=session,
            pin=message.pin,
            json_schema=message.json_schema,
            grammar=message.grammar,
            on_event=on_event,
            on_release=on_release,
        )
        placed.set()

    def _tell_session(self, number: int | None) -> None:
        if number in self._sessions:
            self._outbox.put(self._state(number))

    def _state(self, number: int) -> SessionState:
        session = self._sessions[number]
        return SessionState(number, len(session.token_ids), session.temperature)

    def _open_session(self, number: int, freeze_temperature: bool) -> None:
        self._sessions[number] = self._engine.open_session(freeze_temperature=freeze_temperature)

    def _close_session(self, number: int) -> None:
        self._sessions.pop(number).close()

    def _session_tokens(self, number: int) -> tuple[array[int], list[int]]:
        session = self._sessions[number]
        return array(TOKEN_ARRAY, session.token_ids), list(session.drawn)

    def _save_session(self, number: int, directory: Path, name: str) -> SessionInfo:
        return save_session(self._engine, self._sessions[number], directory, name)

    def _load_session(self, number: int, path: Path) -> tuple[SessionState, bool]:
        session = self._sessions[number] = load_session(self._engine, path)
        return self._state(number), session.freeze_temperature


def main() -> None:
    """Serve the socket whose number is the first argument; for `engine_child.py`."""
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)  # sent to the whole group; the parent drains and ends us
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the stacks of all threads, before it is killed
    logging.basicConfig(level=logging.WARNING, format="qwen1m: %(message)s")
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        Worker(Connection(int(sys.argv[1]))).run()
    sys.stderr.flush()
    os._exit(0)
