"""The server's state: the engine while it loads, serves and restarts; requests; admission."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from ..engine_child import EngineState
from ..engine_process import EngineProcess, SessionProxy
from ..tokenizer import Tokenizer
from .errors import ApiError
from .generation import Generation
from .metrics import Metrics
from .named_sessions import NamedSessions
from .prompts import Prompt, check_room, json_schema, sampling_params
from .registry import Registry
from .schemas import GenerationBody
from .settings import Settings

log = logging.getLogger(__name__)

WORKERS = 4
"""Threads that tokenise, compile grammars and write sessions, beside the event loop."""

T = TypeVar("T")


class Service:
    """Everything that requests share. Its methods run on the event loop."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; `load` makes it ready."""
        self.settings = settings
        self.registry = Registry()
        self.metrics = Metrics(
            lambda: self._engine.stats() if self._engine else None,
            self.registry.running,
            lambda: self._engine.restarts if self._engine else 0,
        )
        self.sessions = NamedSessions(settings.session_dir)
        self.draining = False
        self.failure: BaseException | None = None  # why there is no engine, and will be none
        self.on_failure: Callable[[], None] = lambda: None  # after it had been loaded
        self._engine: EngineProcess | None = None
        self._workers = ThreadPoolExecutor(WORKERS, "qwen1m-server")

    # --- life ---

    async def load(self) -> None:
        """Load the model; on failure `failure` says why."""
        loop = asyncio.get_running_loop()

        def on_state(state: EngineState) -> None:
            loop.call_soon_threadsafe(self._on_state, state)

        try:
            self._engine = await self.work(
                lambda: EngineProcess(
                    self.settings.model_dir,
                    on_state=on_state,
                    timeout_seconds=self.settings.engine_timeout_seconds,
                    **self.settings.engine,
                )
            )
        except Exception as error:
            self.failure = error

    def _on_state(self, state: EngineState) -> None:
        """The engine's process has ended, or has been replaced."""
        log.warning("the engine is %s", state)
        if state == "failed" and self._engine is not None:
            self.failure = self._engine.failure
            self.on_failure()

    @property
    def engine(self) -> EngineProcess:
        """The engine. Raises ApiError 503 while it loads or restarts, and when it has failed."""
        if self.failure is not None:
            raise ApiError(503, str(self.failure), code="engine_failed")
        if self._engine is None:
            raise ApiError(503, "the model is being loaded", code="not_ready", retry_after=5)
        if self._engine.state != "ready":
            message = "the engine had to be restarted; the model is being loaded again"
            raise ApiError(503, message, code="restarting", retry_after=5)
        return self._engine

    @property
    def state(self) -> str:
        """For /health: "loading", "ok", "restarting", "draining"."""
        if self.draining:
            return "draining"
        if self._engine is None:
            return "loading"
        return "ok" if self._engine.state == "ready" else self._engine.state

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer."""
        return self.engine.tokenizer

    async def drain(self, seconds: float) -> None:
        """Let running requests finish, for so long; cancel what is left then."""
        self.draining = True
        end = asyncio.get_running_loop().time() + seconds
        while len(self.registry) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self.registry.cancel_all()

    async def close(self) -> None:
        """Cancel everything and stop the engine."""
        self.draining = True
        self.registry.cancel_all()
        if self._engine is not None:
            engine = self._engine
            await self.work(lambda: engine.shutdown(drain=False))
        self._workers.shutdown(wait=False)

    async def work(self, function: Callable[[], T]) -> T:
        """Run something that takes a while on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    # --- requests ---

    def check_model(self, model: str | None) -> None:
        """Refuse a request for a model that is not served here."""
        if model is not None and model != self.settings.served_name:
            raise ApiError(
                404,
                f"model: expected {self.settings.served_name!r}, got {model!r}",
                param="model",
                code="model_not_found",
            )

    def _admit(self) -> None:
        """Refuse when draining, loading or full."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=30)
        # those on a worker thread are not with the engine yet, but will be
        waiting = self.engine.stats().requests_waiting + self.registry.preparing
        limit = self.settings.max_queue
        if waiting >= limit:
            raise ApiError(
                429,
                f"{waiting} requests are waiting, the limit is {limit}",
                code="queue_full",
                retry_after=self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until the first running prefill ends, within 1 to 60."""
        etas = [s["eta_ms"] / 1000 for s in self.registry.running() if s["eta_ms"] is not None]
        return max(1, min(60, math.ceil(min(etas, default=1.0))))

    async def generate(
        self,
        request: Request,
        body: GenerationBody,
        prefix: str,
        prompts: Callable[[SessionProxy | None], list[Prompt]],
        *,
        alone: bool = False,
        grammar: str | None = None,
    ) -> Generation:
        """Check a request and submit it; the caller closes it with `finish`.

        Args:
            request: for its X-Request-Id.
            body: what is asked for.
            prefix: of a random id.
            prompts: makes the prompts, given the session; runs on a worker thread.
            alone: the session must have no other request.
            grammar: of the output, in place of the body's `response_format`.

        Raises:
            ApiError and the engine's errors; nothing runs then.
        """
        self.check_model(body.model)
        self._admit()
        engine = self.engine
        request_id = self.registry.new_id(prefix, request.headers.get("x-request-id"))
        generation = Generation(request_id, prefix, self.metrics, body.return_progress)
        if body.session is not None:
            generation.session, generation.on_close = self.sessions.use(body.session, alone)

        def submit() -> None:
            schema = json_schema(body) if grammar is None else None
            params = sampling_params(engine, body, constrained=bool(schema or grammar))
            generation.prompts = prompts(generation.session)
            for prompt in generation.prompts:
                check_room(engine, prompt, params.max_tokens)
            generation.submit(
                engine,
                params,
                priority=body.priority,
                pin=body.pin,
                json_schema=schema,
                grammar=grammar,
            )

        self.registry.add(generation)
        try:
            await self.work(submit)
        except BaseException:
            await asyncio.shield(self.finish(generation, forget=True))
            raise
        return generation

    async def finish(self, generation: Generation, forget: bool = False) -> None:
        """Close a generation and take it off the list; `forget`: it has never begun."""
        try:
            await generation.close()
        finally:
            self.registry.remove(generation, forget)
