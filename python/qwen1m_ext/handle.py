"""A request in the hands of its caller: cancel it, ask for its state, take what it produces."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from copy import copy

from .events import Event, Finished, OnEvent, OutputDelta, PromptScored, RequestStatus
from .request import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams


class RequestHandle:
    """Made by `Engine.submit`. Every method may be called from any thread.

    The events are taken in one place: by iterating (`events`, `outputs` or `result`), or by the
    `on_event` given to `submit`, which leaves nothing to iterate.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cancel: Callable[[], None],
        status: Callable[[], RequestStatus],
        on_event: OnEvent | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        """For the engine: `cancel` and `status` reach into it."""
        self.request_id = request_id
        self.prompt, self.prompt_token_ids, self.params = prompt, prompt_token_ids, params
        self._cancel, self._status = cancel, status
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._released, self._on_release = threading.Event(), on_release
        self.emit: OnEvent = on_event or self._events.put

    def cancel(self) -> None:
        """Stop within one chunk; what was computed stays cached. Harmless when finished."""
        self._cancel()

    def status(self) -> RequestStatus:
        """State, progress and time left at this moment."""
        return self._status()

    def wait(self, timeout: float | None = None) -> bool:
        """Until everything that the request held is given back; False after `timeout` seconds."""
        return self._released.wait(timeout)

    def release(self) -> None:
        """For the engine: let `wait` return, and tell whoever asked to be told."""
        self._released.set()
        if self._on_release is not None:
            self._on_release()

    def events(self) -> Iterator[Event]:
        """Every event, waiting for each; the last one is `Finished`."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def outputs(self) -> Iterator[RequestOutput]:
        """The state after every token, the last one `finished`; cancelled samples end in "abort".

        Raises:
            Whatever made the request fail.
        """
        state = _OutputState(self)
        for event in self.events():
            if state.take(event):
                yield state.snapshot()

    def result(self) -> RequestOutput:
        """The finished request. Raises whatever made it fail."""
        state = _OutputState(self)
        for event in self.events():
            state.take(event)
        return state.snapshot()


class _OutputState:
    """A `RequestOutput` that grows by deltas."""

    def __init__(self, handle: RequestHandle) -> None:
        samples = [CompletionOutput(i) for i in range(handle.params.n)]
        if handle.params.logprobs is not None:
            for sample in samples:
                sample.logprobs, sample.cumulative_logprob = [], 0.0
        self.output = RequestOutput(
            handle.request_id, handle.prompt, handle.prompt_token_ids, samples
        )
        self._unfinished = len(samples)

    def take(self, event: Event) -> bool:
        """Take in an event; whether it is a token. Raises whatever made the request fail."""
        if isinstance(event, PromptScored):
            self.output.prompt_logprobs = event.logprobs
        elif isinstance(event, Finished) and event.error is not None:
            raise event.error
        elif isinstance(event, OutputDelta):
            self._add(event)
            return True
        return False

    def _add(self, delta: OutputDelta) -> None:
        sample = self.output.outputs[delta.index]
        sample.token_ids += delta.token_ids
        sample.text += delta.text
        if delta.logprobs is not None and sample.logprobs is not None:
            sample.logprobs += delta.logprobs
            own = zip(delta.token_ids, delta.logprobs, strict=True)
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + sum(
                entries[token].logprob for token, entries in own
            )
        sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
        self.output.metrics = delta.metrics
        self._unfinished -= delta.finish_reason is not None
        self.output.finished = self._unfinished == 0

    def snapshot(self) -> RequestOutput:
        """A copy that later events do not change."""
        shot = copy(self.output)
        shot.metrics = RequestMetrics(**vars(self.output.metrics))
        shot.outputs = []
        for output in self.output.outputs:
            one = copy(output)
            one.token_ids = list(output.token_ids)
            one.logprobs = None if output.logprobs is None else list(output.logprobs)
            shot.outputs.append(one)
        return shot
