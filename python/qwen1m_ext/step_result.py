"""What became of a step: the tokens that it brought, each taken in by its sequence.

A step emits one token of each sample. With speculation it may bring more: they are kept ahead, and
the steps that are planned for them find them ready (`speculative.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sampler import Candidates, not_a_number, rank_tokens
from .sequence import Piece, Request, Sequence, Step


@dataclass
class StepResult:
    """What became of a step."""

    step: Step
    done: frozenset[Sequence] = frozenset()  # their piece was computed
    seconds: float | None = None  # None: not representative
    sampled: list[tuple[Sequence, int, Candidates | None]] = field(default_factory=list)
    representative: bool = True  # for the cost model: nothing was guessed or computed ahead
    finish: Callable[[], None] | None = None  # waits for the rest; to be called once

    def take_ahead(self, pieces: list[Piece]) -> list[Piece]:
        """Emit what was sampled ahead; returns the pieces that have to be computed."""
        work = []
        for piece in pieces:
            sequence = piece.sequence
            speculator = sequence.speculator
            if speculator and speculator.covers(sequence.preemptions):
                self._emit(sequence, *speculator.ahead.popleft())
                continue
            work.append(piece)
            if speculator and sequence.sampler and sequence.sampler.on_device:
                speculator.ahead.clear()  # of before a preemption: a draw there can be repeated
        return work

    def take_drawn(self, piece: Piece, draft: list[int], drawn: list[int]) -> None:
        """Take in what the device has drawn after a piece and after each token of a guess."""
        request = piece.sequence.request
        _first_token(request)
        chosen: list[tuple[int, Candidates | None]] = []
        for token, guess in zip(drawn, [*draft, None], strict=True):
            if token < 0:
                request.fail(not_a_number())
                return
            chosen.append((token, None))
            if token != guess:
                break
        self._keep(piece.sequence, draft, chosen)

    def sample(self, piece: Piece, draft: list[int], logits: Tensor) -> None:
        """Choose the token after a piece, and those behind it as long as the guess was right.

        Args:
            piece: ends with a sample.
            draft: the guess.
            logits: [1 + guessed tokens, vocab] on the host.
        """
        sequence, request = piece.sequence, piece.sequence.request
        sampler, speculator = sequence.sampler, sequence.speculator
        assert sampler is not None, "the runner's sequences have samplers"
        _first_token(request)
        if speculator and speculator.ahead:  # sampled before a preemption, computed again now
            self._emit(sequence, *speculator.ahead.popleft())
            return
        chosen: list[tuple[int, Candidates | None]] = []
        for row, guess in zip(logits, [*draft, None], strict=True):
            try:
                token = sampler.sample(row)
            except Exception as error:
                request.fail(error)
                return
            candidates = None
            if request.params.logprobs is not None:
                chosen_token = torch.tensor([token])
                candidates = rank_tokens(row[None], chosen_token, request.params.logprobs)[0]
            chosen.append((token, candidates))
            if token != guess:
                break
        self._keep(sequence, draft, chosen)

    def _keep(
        self, sequence: Sequence, draft: list[int], chosen: list[tuple[int, Candidates | None]]
    ) -> None:
        """Emit the first of some tokens; the others are ahead. All but the last were guessed."""
        if sequence.speculator:
            metrics = sequence.request.metrics
            sequence.speculator.keep(sequence.preemptions, len(draft), chosen)
            metrics.draft_tokens += len(draft)
            metrics.accepted_tokens += len(chosen) - 1
        self._emit(sequence, *chosen[0])

    def _emit(self, sequence: Sequence, token: int, candidates: Candidates | None) -> None:
        sequence.tokens.append(token)
        self.sampled.append((sequence, token, candidates))


def _first_token(request: Request) -> None:
    """Take the prefill's time and recall, once."""
    if request.metrics.prefill_seconds == 0 and request.started is not None:
        request.metrics.prefill_seconds = time.perf_counter() - request.started
        request.metrics.recall = request.sparse.meter.mean if request.sparse else None
