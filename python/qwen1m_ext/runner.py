"""The model runner: a planned step goes through the model, and out come tokens.

It feeds its own tokens back: a decode piece reads the token that the step before appended, so
nobody has to tell it what was sampled. Pieces of requests that were stopped meanwhile are skipped,
and a step that nobody wants any more is abandoned after the layer at hand. With speculation a
decode piece may bring tokens for later steps too, which find them ready (`speculative.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Batch, Rotary, Segment
from .events import Progress
from .heartbeat import Pulse
from .kv_cache import KVCache
from .model import Qwen2Model, logits_rows
from .ops import PAGE_SIZE
from .sampler import Candidates, rank_tokens
from .sequence import Piece, Sequence, Step
from .weights import weight_bytes


class _Abandoned(Exception):
    pass


@dataclass
class StepResult:
    """What became of a step."""

    step: Step
    done: frozenset[Sequence] = frozenset()  # their piece was computed
    seconds: float | None = None  # None: not representative
    sampled: list[tuple[Sequence, int, Candidates | None]] = field(default_factory=list)
    representative: bool = True  # for the cost model: nothing was guessed or computed ahead


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
        self.pulse = Pulse()  # beats after every layer
        config = model.config
        # from here on a step reads more bytes of the cache than of the weights
        self._long = weight_bytes(config, model.dtype) // config.kv_bytes_per_token(
            cache.k[0].dtype
        )

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
        if len(pieces) == len(step.pieces) and result.representative:
            result.seconds = time.perf_counter() - start
        return result

    def _run(self, step: Step, pieces: list[Piece]) -> StepResult:
        result = StepResult(step, frozenset(piece.sequence for piece in pieces))
        work = []
        for piece in pieces:
            sequence = piece.sequence
            speculator = sequence.speculator
            if speculator and speculator.covers(sequence.preemptions):
                self._emit(sequence, *speculator.ahead.popleft(), result)
            else:
                work.append(piece)
        drafts = self._drafts(work)
        result.representative = len(work) == len(pieces) and not drafts
        if not work:
            return result
        # by length, for calls of the op for few rows; a stable order
        work.sort(key=lambda piece: len(drafts.get(piece, ())) if piece.decode else 1 << 30)
        segments = [s for piece in work for s in self._segments(piece, len(drafts.get(piece, ())))]
        batch = Batch(self._rotary, self._cache, segments)
        ids = [
            token
            for piece in work
            for part in (piece.sequence.tokens[piece.begin : piece.end], drafts.get(piece, ()))
            for token in part
        ]
        wanted = _wanted_rows(work, drafts)
        rows = None if len(wanted) == len(ids) else torch.tensor(wanted, dtype=torch.int64)
        with batch.in_cache():
            hidden = self._model.forward(
                torch.tensor(ids, dtype=torch.int64),
                batch,
                rows,
                lambda done, of: self._report(work, done / of),
            )
        samples: list[tuple[Piece, int]] = []  # and how many rows
        sampled_rows: list[int] = []
        row = 0
        for piece in work:
            count = _rows_of(piece, drafts)
            if _is_scored(piece):
                self._score(piece, hidden[row : row + count])
            row += count
            if piece.sample:
                own = 1 + len(drafts.get(piece, ()))
                samples.append((piece, own))
                sampled_rows.extend(range(row - own, row))
        if samples:
            logits = self._model.logits(hidden[sampled_rows])
            blocks = torch.split(logits, [count for _, count in samples])
            for (piece, _), some in zip(samples, blocks, strict=True):
                self._sample(piece, drafts.get(piece, []), some, result)
        return result

    def _drafts(self, work: list[Piece]) -> dict[Piece, list[int]]:
        """Guesses to check in this step: as many as the workspace and the pages have room for."""
        spare = self._model.workspace.chunk_tokens - sum(p.end - p.begin for p in work)
        logits = logits_rows(self._model.config) - sum(p.sample for p in work)
        drafts = {}
        for piece in work:
            sequence, cache = piece.sequence, piece.sequence.cache
            speculator = sequence.speculator
            if speculator is None or cache is None or speculator.ahead:
                continue
            # rows of different temperatures read the cache one by one: no gain where that is most
            apart = self._temperature(sequence, piece.begin) != self._temperature(
                sequence, piece.end
            )
            if apart and piece.end > self._long:
                continue
            ended = sequence.sampler is not None and sequence.sampler.stops_at(sequence.tokens[-1])
            if ended or not (piece.decode and piece.sample):
                continue
            room = min(
                spare,
                logits,
                len(cache.pages) * PAGE_SIZE - piece.end,
                sequence.prompt_len + sequence.max_tokens - piece.end - 1,
            )
            draft = speculator.guess(sequence.tokens, max(0, room))
            if draft:
                drafts[piece] = draft
                spare, logits = spare - len(draft), logits - len(draft)
        return drafts

    def _segments(self, piece: Piece, drafted: int) -> list[Segment]:
        """A piece and the guess behind it, cut where the temperature changes."""
        sequence, cache = piece.sequence, piece.sequence.cache
        assert cache is not None, "a planned sequence is open"
        few = drafted > 0
        uniform = min(piece.end, max(piece.begin, sequence.prompt_len))
        segments = []
        if uniform > piece.begin:
            s = self._temperature(sequence, piece.begin)
            segments.append(Segment(cache, piece.begin, uniform, s, sequence.request.sparse))
        # output that is computed anew, or decode
        for position in range(uniform, piece.end + drafted):
            s = self._temperature(sequence, position)
            if segments and segments[-1].temperature == s and segments[-1].sparse is None:
                segments[-1] = Segment(cache, segments[-1].begin, position + 1, s, few=few)
            else:
                segments.append(Segment(cache, position, position + 1, s, few=few))
        return segments

    def _report(self, pieces: list[Piece], share: float) -> None:
        """After each layer: progress, and whether anybody still wants the step."""
        self.pulse.beat()
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

    def _sample(self, piece: Piece, draft: list[int], logits: Tensor, result: StepResult) -> None:
        """Choose the token after a piece, and those behind it as long as the guess was right."""
        sequence, request = piece.sequence, piece.sequence.request
        sampler, speculator = sequence.sampler, sequence.speculator
        assert sampler is not None, "the runner's sequences have samplers"
        if request.metrics.prefill_seconds == 0 and request.started is not None:
            request.metrics.prefill_seconds = time.perf_counter() - request.started
            request.metrics.recall = request.sparse.meter.mean if request.sparse else None
        if speculator and speculator.ahead:  # sampled before a preemption, computed again now
            self._emit(sequence, *speculator.ahead.popleft(), result)
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
            if token != guess or sampler.stops_at(token):
                break
        if speculator:
            speculator.keep(sequence.preemptions, len(draft), chosen)
            request.metrics.draft_tokens += len(draft)
            request.metrics.accepted_tokens += len(chosen) - 1
        self._emit(sequence, *chosen[0], result)

    def _emit(
        self,
        sequence: Sequence,
        token: int,
        candidates: Candidates | None,
        result: StepResult,
    ) -> None:
        sequence.tokens.append(token)
        result.sampled.append((sequence, token, candidates))


def _is_scored(piece: Piece) -> bool:
    """Whether somebody wants the hidden states of all its rows."""
    sequence = piece.sequence
    wanted = sequence.request.on_hidden is not None and sequence.is_leader
    return wanted and piece.begin < sequence.prompt_len


def _rows_of(piece: Piece, drafts: dict[Piece, list[int]]) -> int:
    """How many final hidden states of a piece and its guess are wanted: the last ones."""
    if _is_scored(piece):
        return piece.end - piece.begin
    return int(piece.sample) + len(drafts.get(piece, ()))


def _wanted_rows(pieces: list[Piece], drafts: dict[Piece, list[int]]) -> list[int]:
    rows: list[int] = []
    end = 0
    for piece in pieces:
        end += piece.end - piece.begin + len(drafts.get(piece, ()))
        rows.extend(range(end - _rows_of(piece, drafts), end))
    return rows
