"""An engine in a process of its own, for those who must go on when it computes or dies.

When its process ends every request gets a `BackendError`, every open session is lost, and another
process is started (`engine_child.py`).
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from .config import DualChunkConfig, ModelConfig
from .engine_child import DEFAULT_COMMAND, EngineChild, EngineState
from .engine_messages import (
    TOKEN_ARRAY,
    Batch,
    Beat,
    Call,
    Cancel,
    Released,
    Reply,
    SessionState,
    Start,
    Submit,
)
from .errors import BackendError, RequestError
from .events import EngineStats, Event, Finished, OnEvent, OutputDelta, RequestStatus
from .handle import RequestHandle
from .request import RequestMetrics, SamplingParams
from .session_files import SessionInfo
from .tokenizer import Tokenizer


class SessionProxy:
    """A session that is open in the engine's process; see `sessions.Session`."""

    def __init__(self, engine: EngineProcess, number: int, freeze_temperature: bool) -> None:
        """For `EngineProcess`."""
        self._engine, self.number, self.freeze_temperature = engine, number, freeze_temperature
        self.num_tokens = 0
        self.temperature: float | None = None  # s(n); None: nothing cached yet
        self.lost = False  # the process that held it has ended

    def tokens(self) -> tuple[list[int], list[int]]:
        """(token ids in the cache, the output tokens after them); asks the engine."""
        return self._engine.session_tokens(self)

    def close(self) -> None:
        """Give the pages back; harmless when it is lost. Does not wait."""
        self._engine.close_session(self)


@dataclass
class _Open:
    """A request that the child has not released."""

    handle: RequestHandle
    status: RequestStatus
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    finished: bool = False  # its last event is out
    error: BaseException | None = None  # raised by on_event


class EngineProcess:
    """`Engine`'s face, with the engine elsewhere. Every method may be called from any thread.

    What is not here: `on_progress` and `logits_processor`, which would have to run over there
    (`json_schema` does), and `prompt_logits`.
    """

    command: ClassVar[Sequence[str]] = DEFAULT_COMMAND

    def __init__(
        self,
        model_dir: str | Path,
        *,
        on_state: Callable[[EngineState], None] | None = None,
        timeout_seconds: float = 60.0,
        **arguments: Any,
    ) -> None:
        """Start a process and load a checkpoint in it.

        Args:
            model_dir: as `Engine`.
            on_state: called with "restarting", "ready" and "failed" after the first load, on a
                thread of this object.
            timeout_seconds: least time without any progress after which the process is taken for
                stuck and replaced; a step's own limit is ten times its predicted time, if longer.
            arguments: of `Engine`.

        Raises:
            What `Engine` raises; BackendError: the process died while it loaded.
        """
        self.model_dir = Path(model_dir)
        self.tokenizer = Tokenizer(model_dir)
        self._lock = threading.Lock()  # of the next two
        self._requests: dict[str, _Open] = {}
        self._sessions: dict[int, SessionProxy] = {}
        self._numbers = itertools.count(1)
        self._stats = EngineStats()
        self._child = EngineChild(
            Start(str(model_dir), arguments, timeout_seconds),
            self.command,
            self._take,
            self._lose,
            on_state or (lambda state: None),
        )

    # --- facts ------------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config.json."""
        return self._child.facts.config

    @property
    def dual_chunk(self) -> DualChunkConfig:
        """The positions in use."""
        return self._child.facts.dual_chunk

    @property
    def dtype(self) -> str:
        """Of weights and cache: "bfloat16" or "float32"."""
        return str(self._child.facts.dtype).removeprefix("torch.")

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus output."""
        return self._child.facts.max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        return self._child.facts.eos_token_ids

    @property
    def prefill(self) -> str:
        """The policy of prefills, described."""
        return self._child.facts.prefill

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._child.pid

    @property
    def state(self) -> EngineState:
        """Whether there is an engine: requests are taken when it is "ready"."""
        return self._child.state

    @property
    def failure(self) -> BaseException | None:
        """Why there is no engine any more; None while there is one or will be."""
        return self._child.failure

    @property
    def restarts(self) -> int:
        """How often a process that died has been replaced."""
        return self._child.restarts

    def default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends, with vLLM's default of 16 tokens."""
        return SamplingParams.from_defaults(self._child.facts.generation_config, max_tokens=16)

    # --- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
        session: SessionProxy | None = None,
        pin: bool = False,
        json_schema: dict[str, Any] | None = None,
        grammar: str | None = None,
        on_event: OnEvent | None = None,
    ) -> RequestHandle:
        """Queue a request, as `Engine.submit`; returns when the engine has accepted it.

        Raises:
            As `Engine.submit`; BackendError: there is no engine at the moment.
        """
        if isinstance(prompt, str):
            prompt_text, token_ids = prompt, self.tokenizer.encode(prompt)
        else:
            token_ids = list(prompt)
        try:
            tokens = array(TOKEN_ARRAY, token_ids)
        except OverflowError:
            bad, vocab = max(token_ids, key=abs), self.config.vocab_size
            raise RequestError(
                f"prompt_token_ids: expected ids in [0, {vocab}), got {bad}"
            ) from None
        params = self.default_sampling_params() if params is None else params
        name = request_id or f"request-{next(self._numbers)}"
        handle = RequestHandle(
            name,
            prompt_text,
            token_ids,
            params,
            lambda: self._child.tell(Cancel(name)),
            lambda: request.status,
            on_event,
        )
        request = _Open(handle, RequestStatus(name, "queued", 0, len(token_ids), 0, None, 0))
        if session is not None and session.lost:
            raise BackendError("session: it was lost when the engine's process ended")
        with self._lock:
            if name in self._requests:
                raise RequestError(f"request_id: expected a new one, got {name!r}")
            self._requests[name] = request
        message = Submit(
            tokens,
            params,
            prompt_text,
            priority,
            name,
            None if session is None else session.number,
            pin,
            json_schema,
            grammar,
        )
        try:
            self._child.call("submit", message)
        except BaseException:
            with self._lock:
                self._requests.pop(name, None)
            raise
        return handle

    def unpin(self, request_id: str) -> bool:
        """As `Engine.unpin`."""
        return bool(self._child.call("unpin", request_id))

    def stats(self) -> EngineStats:
        """As `Engine.stats`, as of the last message of the engine; zeros while there is none."""
        return self._stats

    # --- sessions ---------------------------------------------------------------------------------

    def open_session(self, *, freeze_temperature: bool = False) -> SessionProxy:
        """As `Engine.open_session`."""
        session = self._new_session(freeze_temperature)
        self._child.call("open_session", session.number, freeze_temperature)
        return session

    def session_tokens(self, session: SessionProxy) -> tuple[list[int], list[int]]:
        """See `SessionProxy.tokens`."""
        cached, drawn = self._child.call("session_tokens", session.number)
        return cached.tolist(), drawn

    def close_session(self, session: SessionProxy) -> None:
        """As `Session.close`; does not wait."""
        with self._lock:
            if self._sessions.pop(session.number, None) is not None:
                self._child.tell(Call(0, "close_session", (session.number,)))

    def save_session(self, session: SessionProxy, directory: Path, name: str) -> SessionInfo:
        """As `session_files.save_session`."""
        info: SessionInfo = self._child.call("save_session", session.number, directory, name)
        return info

    def load_session(self, path: Path) -> SessionProxy:
        """As `session_files.load_session`."""
        session = self._new_session(False)
        state, session.freeze_temperature = self._child.call("load_session", session.number, path)
        session.num_tokens, session.temperature = state.num_tokens, state.temperature
        return session

    def _new_session(self, freeze_temperature: bool) -> SessionProxy:
        session = SessionProxy(self, next(self._numbers), freeze_temperature)
        with self._lock:
            self._sessions[session.number] = session
        return session

    # --- on the thread that listens to the engine ------------------------------------------------

    def _take(self, batch: Batch) -> None:
        # First how things stand after the items: who is woken by one may ask.
        if batch.stats is not None and batch.statuses is not None:
            self._stats = batch.stats
            for name, status in batch.statuses.items():
                if request := self._requests.get(name):
                    request.status = status
        for item in batch.items:
            if isinstance(item, Reply | Beat):
                continue
            if isinstance(item, SessionState):
                if session := self._sessions.get(item.number):
                    session.num_tokens, session.temperature = item.num_tokens, item.temperature
            elif isinstance(item, Released):
                if request := self._requests.get(item.request_id):
                    request.status = item.status
                    self._release(request)
            elif request := self._requests.get(item[0]):
                self._emit(request, item[1])

    def _emit(self, request: _Open, event: Event) -> None:
        if isinstance(event, OutputDelta):
            request.metrics = event.metrics
        elif isinstance(event, Finished):
            request.finished = True
            self._child.completed |= event.error is None and not event.cancelled
            if request.error is not None:
                event = Finished(event.metrics, request.error)
        try:
            request.handle.emit(event)
        except BaseException as error:
            request.error = request.error or error
            request.handle.cancel()

    def _release(self, request: _Open) -> None:
        with self._lock:
            self._requests.pop(request.handle.request_id, None)
        request.handle.release()

    def _lose(self, reason: str) -> None:
        """The process is gone: the requests are told."""
        with self._lock:
            requests = list(self._requests.values())
            for session in self._sessions.values():
                session.lost = True
            self._sessions.clear()
        self._stats = EngineStats()
        for request in requests:
            if not request.finished:
                error = BackendError(f"engine: {reason} while it was working on this request")
                self._emit(request, Finished(request.metrics, error))
            request.status = replace(request.status, state="finished")
            self._release(request)

    def shutdown(self, drain: bool = True) -> None:
        """As `Engine.shutdown`; the process has ended then."""
        self._child.shutdown(drain)
