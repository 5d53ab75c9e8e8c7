"""The model runner: a planned step goes through the model, and out come tokens.

It feeds its own tokens back: a decode piece reads the token that the step before appended, so
nobody has to tell it what was sampled. Pieces of requests that were stopped meanwhile are skipped,
and a step that nobody wants any more is abandoned after the layer at hand. With speculation a
decode piece may bring tokens for later steps too, which find them ready (`speculative.py`).

On a device with a queue a step has not run when `run` returns. Its tokens stay there for the next
step (`device_sampler.py`), and whoever calls the result's `finish` waits for them and appends them.
What the host has to look at (log probabilities, masks) it waits for within the step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Batch, Rotary, Segment
from .decode_step import DecodeRow, DecodeStep
from .device import Event, StreamDevice
from .device_sampler import DeviceSampler, Draw, Settings, waiting
from .errors import BackendError
from .events import Progress
from .heartbeat import Pulse
from .kv_cache import KVCache
from .model import Qwen2Model, logits_rows
from .ops import PAGE_SIZE
from .sampler import Candidates, Sampler, not_a_number, rank_tokens
from .sequence import Piece, Request, Sequence, Step
from .weights import weight_bytes

LAYERS_AHEAD = 2
"""Layers of a prefill that may be queued before they run: progress is no farther off."""


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
    finish: Callable[[], None] | None = None  # waits for the rest; to be called once, on any thread


class ModelRunner:
    """Runs steps, one after the other, on one thread."""

    def __init__(
        self,
        model: Qwen2Model,
        rotary: Rotary,
        cache: KVCache,
        temperature: Callable[[Sequence, int], float],
        prefill_work: Callable[[int, int, bool], float],
        decodes: DecodeStep | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: weights and workspace.
            rotary: positions.
            cache: where the sequences live.
            temperature: s of a sequence at a position.
            prefill_work: cost of the prompt tokens [begin, end), dense or sparse, in any unit.
            decodes: with a device that has a queue, what goes on there from token to token.
        """
        self._model, self._rotary, self._cache = model, rotary, cache
        self._temperature, self._prefill_work = temperature, prefill_work
        self.pulse = Pulse()  # beats after every layer
        self._device, self._decodes = cache.device, decodes
        self._drawn: tuple[list[Piece], Tensor] = [], torch.empty(0)  # of the step at hand
        self._finished = 0.0  # when the last step was known to be done
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
            with torch.inference_mode(), self._device.scope():
                result = (
                    self._run(step, pieces)
                    if self._decodes is None
                    else self._queue(step, pieces, start, self._decodes)
                )
        except _Abandoned:
            return StepResult(step)
        except Exception as error:
            for piece in pieces:
                piece.sequence.request.fail(error)
            self._check_device()
            return StepResult(step)
        if result.finish is None and len(pieces) == len(step.pieces) and result.representative:
            result.seconds = time.perf_counter() - start
        return result

    def _queue(
        self, step: Step, pieces: list[Piece], start: float, decodes: DecodeStep
    ) -> StepResult:
        """Queue a step on a device; `finish` takes what it samples there."""
        device = self._device
        assert isinstance(device, StreamDevice)
        result, sampled = StepResult(step, frozenset(p.sequence for p in pieces)), pieces
        with device.step():
            if all(_decodes_on_device(piece) for piece in pieces):
                rows = [
                    DecodeRow(
                        _token(piece),
                        self._rotary.logit_scale(self._temperature(piece.sequence, piece.begin)),
                        self._draw(piece, decodes.sampler),
                    )
                    for piece in pieces
                ]
                spans = [(p.sequence.cache, p.begin, p.end) for p in pieces if p.sequence.cache]
                with self._cache.step(spans):
                    drawn = decodes.run(rows)
            else:
                result = self._run(step, pieces)
                sampled, drawn = self._drawn
            fetched = device.fetch(drawn[: len(sampled)])

        def finish() -> None:
            try:
                tokens = fetched()
            except Exception as error:
                raise _broken(device, error) from error
            begin, self._finished = max(start, self._finished), time.perf_counter()
            if len(pieces) == len(step.pieces):
                result.seconds = self._finished - begin
            for piece, token in zip(sampled, tokens, strict=True):
                self._first_token(piece.sequence.request)
                if token < 0:
                    piece.sequence.request.fail(not_a_number())
                else:
                    self._emit(piece.sequence, token, None, result)

        result.finish = finish
        return result

    def _check_device(self) -> None:
        """After an error: raises BackendError if it was a kernel's, which no request survives."""
        if isinstance(self._device, StreamDevice):
            try:
                with self._device.scope():
                    self._device.record().synchronize()
            except Exception as error:
                raise _broken(self._device, error) from error

    def _draw(self, piece: Piece, sampler: DeviceSampler) -> Draw:
        """How the token after a piece is sampled on the device."""
        sequence = piece.sequence
        assert sequence.cache is not None and sequence.sampler is not None
        draw = Draw(sequence.cache.row, piece.end - 1, sequence.sampler)
        sampler.admit(draw, sequence.preemptions, sequence.tokens, sequence.prompt_len)
        return draw

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
        wanted = _wanted_rows(work, drafts)
        rows = None if len(wanted) == len(batch) else torch.tensor(wanted, dtype=torch.int64)
        with batch.in_cache():
            hidden = self._model.forward(
                self._token_ids(work, drafts), batch, rows, self._on_layer(work)
            )
        samples: list[tuple[Piece, int]] = []  # and how many rows
        sampled_rows: list[int] = []
        drawn_rows: list[int] = []  # of those that are sampled on the device
        row = 0
        for piece in work:
            count = _rows_of(piece, drafts)
            if _is_scored(piece):
                self._score(piece, hidden[row : row + count])
            row += count
            if self._decodes and _sampled_on_device(piece):
                drawn_rows.append(row - 1)
            elif piece.sample:
                own = 1 + len(drafts.get(piece, ()))
                samples.append((piece, own))
                sampled_rows.extend(range(row - own, row))
        if self._decodes:
            drawn = [piece for piece in work if _sampled_on_device(piece)]
            self._drawn = (
                drawn,
                self._sample_on_device(self._decodes.sampler, hidden, drawn_rows, drawn),
            )
        if samples:
            logits = self._model.logits(hidden[self._device.put(torch.tensor(sampled_rows))])
            blocks = torch.split(logits.cpu(), [count for _, count in samples])
            for (piece, _), some in zip(samples, blocks, strict=True):
                self._sample(piece, drafts.get(piece, []), some, result)
        return result

    def _token_ids(self, work: list[Piece], drafts: dict[Piece, list[int]]) -> Tensor:
        """[rows] int64 on the device, those included that the host has not seen."""
        ids: list[int] = []
        waits = 0  # decodes come first
        for piece in work:
            if piece.begin < len(piece.sequence.tokens):
                ids += piece.sequence.tokens[piece.begin : piece.end]
            else:
                ids.append(_token(piece))
                waits = len(ids)
            ids += drafts.get(piece, ())
        token_ids = self._device.put(torch.tensor(ids, dtype=torch.int64))
        if waits and self._decodes:
            token_ids[:waits] = self._decodes.sampler.known(token_ids[:waits])
        return token_ids

    def _sample_on_device(
        self, sampler: DeviceSampler, hidden: Tensor, rows: list[int], pieces: list[Piece]
    ) -> Tensor:
        """[n] the tokens after some pieces, from their rows of the final hidden states."""
        put, n = self._device.put, len(rows)
        if not n:
            return hidden.new_empty(0, dtype=torch.int64)
        draws = [self._draw(piece, sampler) for piece in pieces]
        settings = Settings.of(draws, n, sampler.spare_row)
        self._model.logits(hidden[put(torch.tensor(rows))], sampler.logits(n))
        return sampler.sample(
            Settings(put(settings.numbers), put(settings.shares), put(settings.penalties))
        )

    def _on_layer(self, work: list[Piece]) -> Callable[[int, int], None] | None:
        """Progress, and with a queue: that it does not run ahead of what is reported."""
        device = self._device
        if not isinstance(device, StreamDevice):
            return lambda done, of: self._report(work, done / of)
        if all(piece.decode for piece in work):
            return None
        queued: deque[Event] = deque()

        def report(done: int, of: int) -> None:
            queued.append(device.record())
            if len(queued) > LAYERS_AHEAD:
                queued.popleft().synchronize()
            self._report(work, done / of)

        return report

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
        self._first_token(request)
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

    def _first_token(self, request: Request) -> None:
        """Take the prefill's time and recall, once."""
        if request.metrics.prefill_seconds == 0 and request.started is not None:
            request.metrics.prefill_seconds = time.perf_counter() - request.started
            request.metrics.recall = request.sparse.meter.mean if request.sparse else None

    def _emit(
        self,
        sequence: Sequence,
        token: int,
        candidates: Candidates | None,
        result: StepResult,
    ) -> None:
        sequence.tokens.append(token)
        result.sampled.append((sequence, token, candidates))


def _broken(device: StreamDevice, error: Exception) -> BackendError:
    return BackendError(f"{device.name}: work on the device has failed: {error}")


def _sampled_on_device(piece: Piece) -> bool:
    """Whether the token after a piece need not come to the host before the next step."""
    sampler: Sampler | None = piece.sequence.sampler
    return piece.sample and sampler is not None and sampler.on_device


def _decodes_on_device(piece: Piece) -> bool:
    """Whether a piece goes from token to token there."""
    return piece.decode and _sampled_on_device(piece)


def _token(piece: Piece) -> int:
    """The token of a decode piece, or the one that waits on the device."""
    tokens, cache = piece.sequence.tokens, piece.sequence.cache
    assert cache is not None, "a planned sequence is open"
    return tokens[piece.begin] if piece.begin < len(tokens) else waiting(cache.row)


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
