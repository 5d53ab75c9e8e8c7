"""The model runner: a planned step goes through the model, and out come tokens.

It feeds its own tokens back: a decode piece reads the token that the step before appended, so
nobody has to tell it what was sampled. Pieces of requests that were stopped meanwhile are skipped,
and a step that nobody wants any more is abandoned after the layer at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Batch, Rotary, Segment
from .events import Progress
from .kv_cache import KVCache
from .model import Qwen2Model
from .sampler import Candidates, rank_tokens
from .sequence import Piece, Sequence, Step


class _Abandoned(Exception):
    pass


@dataclass
class StepResult:
    """What became of a step."""

    step: Step
    done: frozenset[Sequence] = frozenset()  # their piece was computed
    seconds: float | None = None  # None: not representative
    sampled: list[tuple[Sequence, int, Candidates | None]] = field(default_factory=list)


class ModelRunner:
    """Runs steps, one after the other, on one thread."""

    def __init__(
        self,
        model: Qwen2Model,
        rotary: Rotary,
        cache: KVCache,
        temperature: Callable[[Sequence, int], float],
        prefill_work: Callable[[int, int, bool], float],
    ) -> None:
        """Prepare.

        Args:
            model: weights and workspace.
            rotary: positions.
            cache: where the sequences live.
            temperature: s of a sequence at a position.
            prefill_work: cost of the prompt tokens [begin, end), dense or sparse, in any unit.
        """
        self._model, self._rotary, self._cache = model, rotary, cache
        self._temperature, self._prefill_work = temperature, prefill_work

    def run(self, step: Step) -> StepResult:
        """Compute a step. Errors stop the requests that they hit; nothing is raised."""
        pieces = [piece for piece in step.pieces if not piece.sequence.request.stopped]
        if not pieces:
            return StepResult(step)
        start = time.perf_counter()
        for piece in pieces:
            if piece.sequence.request.started is None:
                piece.sequence.request.started = start
        try:
            with torch.inference_mode():
                result = self._run(step, pieces)
        except _Abandoned:
            return StepResult(step)
        except Exception as error:
            for piece in pieces:
                piece.sequence.request.fail(error)
            return StepResult(step)
        result.seconds = time.perf_counter() - start if len(pieces) == len(step.pieces) else None
        return result

    def _run(self, step: Step, pieces: list[Piece]) -> StepResult:
        segments = [segment for piece in pieces for segment in self._segments(piece)]
        batch = Batch(self._rotary, self._cache, segments)
        ids = [t for piece in pieces for t in piece.sequence.tokens[piece.begin : piece.end]]
        wanted = _wanted_rows(pieces)
        rows = None if len(wanted) == len(ids) else torch.tensor(wanted, dtype=torch.int64)
        hidden = self._model.forward(
            torch.tensor(ids, dtype=torch.int64),
            batch,
            rows,
            lambda done, of: self._report(pieces, done / of),
        )
        result = StepResult(step, frozenset(piece.sequence for piece in pieces))
        samples, last_rows = [], []
        row = 0
        for piece in pieces:
            count = _rows_of(piece)
            if _is_scored(piece):
                self._score(piece, hidden[row : row + count])
            row += count
            if piece.sample:
                samples.append(piece)
                last_rows.append(row - 1)
        if samples:
            logits = self._model.logits(hidden[last_rows])
            for piece, one in zip(samples, logits, strict=True):
                self._sample(piece, one, result)
        return result

    def _segments(self, piece: Piece) -> list[Segment]:
        """A piece, cut where the temperature changes."""
        sequence, cache = piece.sequence, piece.sequence.cache
        assert cache is not None, "a planned sequence is open"
        uniform = min(piece.end, max(piece.begin, sequence.prompt_len))
        segments = []
        if uniform > piece.begin:
            s = self._temperature(sequence, piece.begin)
            segments.append(Segment(cache, piece.begin, uniform, s, sequence.request.sparse))
        for position in range(uniform, piece.end):  # output that is computed anew, or decode
            s = self._temperature(sequence, position)
            if segments and segments[-1].temperature == s and segments[-1].sparse is None:
                segments[-1] = Segment(cache, segments[-1].begin, position + 1, s)
            else:
                segments.append(Segment(cache, position, position + 1, s))
        return segments

    def _report(self, pieces: list[Piece], share: float) -> None:
        """After each layer: progress, and whether anybody still wants the step."""
        now = time.perf_counter()
        for piece in pieces:
            sequence, request = piece.sequence, piece.sequence.request
            if piece.begin >= sequence.prompt_len or not sequence.is_leader or request.stopped:
                continue
            total = sequence.prompt_len
            end = min(piece.end, total)
            request.done = piece.begin + share * (end - piece.begin)
            report = request.on_progress
            if report is None or request.started is None:
                continue

            def work(begin: int, end: int, sparse: bool = request.policy.sparse) -> float:
                return self._prefill_work(begin, end, sparse)

            done = work(request.cached, piece.begin) + share * work(piece.begin, end)
            left = work(request.cached, total) - done
            elapsed = now - request.started
            eta: float | None = None
            if request.done >= total:
                eta = 0.0
            elif done > 0:
                eta = elapsed * max(0.0, left) / done
            try:
                report(Progress(int(request.done), total, eta, elapsed, request.cached))
            except BaseException as error:
                request.fail(error)
        if all(piece.sequence.request.stopped for piece in pieces):
            raise _Abandoned

    def _score(self, piece: Piece, hidden: Tensor) -> None:
        """Hand the prompt's hidden states to who asked for them, each row once."""
        request = piece.sequence.request
        skip = max(0, request.scored - piece.begin)
        if request.on_hidden is not None and skip < len(hidden):
            try:
                request.on_hidden(piece.begin + skip, hidden[skip:])
            except Exception as error:
                request.fail(error)
            request.scored = piece.end

    def _sample(self, piece: Piece, logits: Tensor, result: StepResult) -> None:
        sequence, request = piece.sequence, piece.sequence.request
        assert sequence.sampler is not None, "the runner's sequences have samplers"
        if request.metrics.prefill_seconds == 0 and request.started is not None:
            request.metrics.prefill_seconds = time.perf_counter() - request.started
            request.metrics.recall = request.sparse.meter.mean if request.sparse else None
        try:
            token = sequence.sampler.sample(logits)
        except Exception as error:
            request.fail(error)
            return
        count = request.params.logprobs
        candidates = None
        if count is not None:
            candidates = rank_tokens(logits[None], torch.tensor([token]), count)[0]
        sequence.tokens.append(token)
        result.sampled.append((sequence, token, candidates))


def _is_scored(piece: Piece) -> bool:
    """Whether somebody wants the hidden states of all its rows."""
    sequence = piece.sequence
    wanted = sequence.request.on_hidden is not None and sequence.is_leader
    return wanted and piece.begin < sequence.prompt_len


def _rows_of(piece: Piece) -> int:
    """How many of a piece's final hidden states are wanted: its last ones."""
    return piece.end - piece.begin if _is_scored(piece) else int(piece.sample)


def _wanted_rows(pieces: list[Piece]) -> list[int]:
    rows: list[int] = []
    end = 0
    for piece in pieces:
        end += piece.end - piece.begin
        rows.extend(range(end - _rows_of(piece), end))
    return rows
