"""From sampled tokens to events: text, stop conditions, logprobs, the end of a request.

Runs on a thread of its own, so that no step waits for a tokenizer. It is the first to know that a
sample is complete and tells the scheduler, which may have planned a step beyond it by then: what
that step samples finds the sample complete and is dropped here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from .events import Event, Finished, OutputDelta, PromptScored
from .output import OutputBuilder
from .request import RequestMetrics, TokenLogprobs
from .sampler import Candidates, with_texts
from .sequence import Request, Sequence
from .tokenizer import Tokenizer


class OutputProcessor:
    """The samples under way. Every method runs on one thread."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        on_finish: Callable[[Sequence, int], None],
    ) -> None:
        """`on_finish(sequence, outputs)`: a sample is complete with so many tokens."""
        self._tokenizer, self._eos, self._on_finish = tokenizer, eos_token_ids, on_finish
        self._builders: dict[Sequence, OutputBuilder] = {}
        self._ended: set[Request] = set()
        self.output_tokens = 0
        self.finished: dict[str, int] = {}  # requests by reason

    def scored(self, request: Request, rows: list[Candidates]) -> None:
        """The logprobs of all prompt tokens but the first."""
        texts: list[TokenLogprobs | None] = [None]
        texts += [with_texts(row, self._tokenizer) for row in rows]
        self._emit(request, PromptScored(texts))

    def push(self, sequence: Sequence, token: int, candidates: Candidates | None) -> None:
        """A token has been sampled."""
        request = sequence.request
        if request in self._ended:
            return
        builder = self._builders.get(sequence)
        if builder is None:
            builder = OutputBuilder(
                sequence.index, request.params, self._tokenizer, self._eos, sequence.max_tokens
            )
            self._builders[sequence] = builder
        if builder.finished or request.stopped:
            return
        output, shown = builder.output, len(builder.output.text)
        logprobs = None if candidates is None else with_texts(candidates, self._tokenizer)
        builder.push(token, logprobs)
        self._count(request)
        self._emit(
            request,
            OutputDelta(
                sequence.index,
                [token],
                output.text[shown:],
                RequestMetrics(**vars(request.metrics)),
                None if logprobs is None else [logprobs],
                output.finish_reason,
                output.stop_reason,
            ),
        )
        if builder.finished:
            self._on_finish(sequence, len(output.token_ids))
            if all(s in self._builders and self._builders[s].finished for s in request.samples):
                self._end(request, output.finish_reason or "stop")

    def released(self, request: Request) -> None:
        """Nothing of a request runs any more. If it is not complete, it was stopped."""
        if request not in self._ended:
            for sequence in request.samples if request.error is None else ():
                builder = self._builders.get(sequence)
                if builder is None or not builder.finished:
                    text = builder.flush() if builder else ""
                    metrics = RequestMetrics(**vars(request.metrics))
                    self._emit(
                        request, OutputDelta(sequence.index, [], text, metrics, None, "abort")
                    )
            self._end(request, "abort" if request.error is None else "error")
        self._ended.discard(request)
        for sequence in request.samples:
            self._builders.pop(sequence, None)
        if request.handle is not None:
            request.handle.release()

    def _count(self, request: Request) -> None:
        metrics, now = request.metrics, time.perf_counter()
        self.output_tokens += 1
        metrics.output_tokens += 1
        since = now - request.submitted
        if metrics.output_tokens == 1:
            metrics.time_to_first_token = since
        else:
            metrics.decode_seconds = since - metrics.time_to_first_token

    def _end(self, request: Request, reason: str) -> None:
        self._ended.add(request)
        self.finished[reason] = self.finished.get(reason, 0) + 1
        metrics = RequestMetrics(**vars(request.metrics))
        self._emit(
            request, Finished(metrics, request.error, request.stopped and request.error is None)
        )

    def _emit(self, request: Request, event: Event) -> None:
        if request.handle is None:
            return
        try:
            request.handle.emit(event)
        except BaseException as error:
            request.fail(error)
