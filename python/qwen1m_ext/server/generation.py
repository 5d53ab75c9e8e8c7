"""One HTTP request inside the engine: its prompts' handles, and one queue of their events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..engine_process import EngineProcess, SessionProxy
from ..events import Event, Finished, OutputDelta, Progress
from ..handle import RequestHandle
from ..request import RequestMetrics, SamplingParams
from .errors import CLIENT_CLOSED, ApiError
from .metrics import Metrics
from .prompts import Prompt

PROGRESS_SECONDS = 0.2
"""At most one progress event per prompt in this time; the engine reports every layer."""


class Generation:
    """The prompts of a request, submitted together, cancelled together."""

    def __init__(self, request_id: str, kind: str, metrics: Metrics, progress: bool) -> None:
        """Prepare; `submit` starts it. `progress`: whether anybody wants to see Progress events."""
        self.request_id, self.kind = request_id, kind
        self.prompts: list[Prompt] = []
        self.submitted = False
        self.created = time.time()
        self.cancelled = False
        self.results: list[RequestMetrics] = []
        self.session: SessionProxy | None = None
        self.on_close: Callable[[], None] | None = None
        self._metrics, self._progress = metrics, progress
        self._handles: list[RequestHandle] = []
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running = 0  # prompts that have not ended

    def submit(
        self,
        engine: EngineProcess,
        params: SamplingParams,
        *,
        priority: int,
        pin: bool,
        json_schema: dict[str, Any] | None,
        grammar: str | None,
    ) -> None:
        """Hand `prompts` to the engine; blocks for a moment, so call it on a worker thread.

        Raises:
            What `Engine.submit` raises; then nothing of this request is left running.
        """
        self._running = len(self.prompts)
        self.results = [RequestMetrics() for _ in self.prompts]
        try:
            for index, prompt in enumerate(self.prompts):
                suffix = f"-{index}" if len(self.prompts) > 1 else ""
                handle = engine.submit(
                    prompt.token_ids,
                    params,
                    prompt_text=prompt.text,
                    priority=priority,
                    request_id=self.request_id + suffix,
                    session=self.session,
                    pin=pin,
                    json_schema=json_schema,
                    grammar=grammar,
                    on_event=self._receiver(index),
                )
                self._handles.append(handle)
        except BaseException:
            for handle in self._handles:
                handle.cancel()
            raise
        self.submitted = True
        if self.cancelled:  # while it was being submitted
            self.cancel()

    def _receiver(self, index: int) -> Callable[[Event], None]:
        """What the engine's thread calls with the events of one prompt."""
        submitted = time.perf_counter()
        last_progress = 0.0
        last_token: dict[int, float] = {}  # by sample

        def receive(event: Event) -> None:
            nonlocal last_progress
            now = time.perf_counter()
            if isinstance(event, Progress):
                if not self._progress:
                    return
                if now - last_progress < PROGRESS_SECONDS and event.done < event.total:
                    return
                last_progress = now
            elif isinstance(event, OutputDelta) and event.token_ids:
                if event.index in last_token:
                    self._metrics.inter_token_latency.observe(now - last_token[event.index])
                elif not last_token:
                    self._metrics.time_to_first_token.observe(now - submitted)
                last_token[event.index] = now
            elif isinstance(event, Finished):
                self._metrics.finished(event, now - submitted)
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return receive

    def cancel(self) -> None:
        """Stop all of it within one chunk; harmless when it is finished."""
        self.cancelled = True
        for handle in self._handles:
            handle.cancel()

    async def events(self, silence: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(prompt, event) until every prompt is finished; None after `silence` seconds without one.

        Raises:
            ApiError: cancelled by somebody.
            Whatever made a prompt fail.
        """
        while self._running:
            try:
                index, event = await asyncio.wait_for(self._queue.get(), silence)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Finished):
                self._running -= 1
                self.results[index] = event.metrics
                if event.error is not None:
                    raise event.error
                if event.cancelled:
                    raise ApiError(
                        CLIENT_CLOSED,
                        f"request {self.request_id} was cancelled",
                        code="request_cancelled",
                    )
            yield index, event

    async def close(self) -> None:
        """Cancel what still runs and wait until it has given back what it held."""
        if self._running:
            self.cancel()
        try:
            for handle in self._handles:
                while not handle.wait(0):
                    await asyncio.sleep(0.02)
        finally:
            if self.on_close is not None:
                self.on_close()
                self.on_close = None

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; `attention_temperature` where a session has frozen it."""
        prompt = sum(len(p.token_ids) for p in self.prompts)
        output = sum(metrics.output_tokens for metrics in self.results)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(m.cached_tokens for m in self.results)},
        }
        if self.session is not None and self.session.freeze_temperature:
            usage["attention_temperature"] = self.session.temperature
        return usage

    def status(self) -> dict[str, Any]:
        """State and progress at this moment, prompts added up; `eta_ms` of the slowest."""
        all_of_them = [handle.status() for handle in self._handles]
        order = ("prefill", "decode", "queued", "finished")
        states = {status.state for status in all_of_them} or {"queued"}
        etas = [s.eta for s in all_of_them if s.state in ("queued", "prefill")]
        known = [eta for eta in etas if eta is not None]
        return {
            "id": self.request_id,
            "object": "request",
            "kind": self.kind,
            "created": int(self.created),
            "state": "cancelled" if self.cancelled else next(s for s in order if s in states),
            "done": sum(s.done for s in all_of_them),
            "total": sum(len(p.token_ids) for p in self.prompts),
            "cached": sum(s.cached for s in all_of_them),
            "eta_ms": round(1000 * max(known)) if known and len(known) == len(etas) else None,
            "output_tokens": sum(s.output_tokens for s in all_of_them),
        }
