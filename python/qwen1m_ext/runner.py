"""The model runner: a planned step goes through the model, and out come tokens.

It feeds its own tokens back: a decode piece reads the token that the step before appended, so
nobody has to tell it what was sampled. Pieces of requests that were stopped meanwhile are skipped,
and a step that nobody wants any more is abandoned after the layer at hand. With speculation a
decode piece may bring tokens for later steps too, which find them ready (`speculative.py`).

On a device with a queue a step has not run when `run` returns. Its tokens stay there for the next
step (`device_sampler.py`), and whoever calls the result's `finish` waits for them and appends them.
What the host has to look at it waits for: for log probabilities and masks within the step, for the
tokens that a guess is made from, or that a guess has brought, before the next one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .attention import Batch, Rotary, Segment
from .decode_step import CHECK_SEQUENCES, DecodeRow, DecodeStep
from .device import StreamDevice
from .device_sampler import DeviceSampler, Draw, Settings, waiting
from .drafts import Drafter
from .errors import BackendError
from .heartbeat import Pulse
from .kv_cache import KVCache
from .model import Qwen2Model
from .progress import Abandoned, LayerProgress
from .sequence import Piece, Sequence, Step
from .step_result import StepResult


class _Unfinished:
    """A step on a device. Its tokens are taken in once, by the first who calls, on any thread."""

    def __init__(self, take: Callable[[], None], checks: bool) -> None:
        self._take, self._lock = take, threading.Lock()
        self.checks = checks  # guesses, so that nobody knows how many tokens come
        self.done = False

    def __call__(self) -> None:
        """Wait for the tokens; behind the steps before this one."""
        with self._lock:
            if not self.done:
                self._take()
                self.done = True


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
        self._temperature = temperature
        self.pulse = Pulse()  # beats after every layer
        self._device, self._decodes = cache.device, decodes
        self._progress = LayerProgress(cache.device, self.pulse, prefill_work)
        self._drawn: tuple[list[Piece], Tensor, list[range]] = [], torch.empty(0), []
        self._unfinished: deque[_Unfinished] = deque()
        self._finished = 0.0  # when the last step was known to be done
        self._drafter = Drafter(model, device=decodes is not None)

    def run(self, step: Step) -> StepResult:
        """Compute a step. Errors stop the requests that they hit; nothing is raised."""
        pieces = [piece for piece in step.pieces if not piece.sequence.request.stopped]
        if not pieces:
            return StepResult(step)
        start = time.perf_counter()
        for piece in pieces:
            if piece.sequence.request.started is None:
                piece.sequence.request.started = start
        result, computed = StepResult(step), frozenset(p.sequence for p in pieces)
        try:
            with torch.inference_mode(), self._device.scope():
                few = self._catch_up(pieces)
                work = result.take_ahead(pieces)
                drafts = self._drafter.guesses(work, few)
                result.representative = len(work) == len(pieces) == len(step.pieces) and not drafts
                if self._decodes is not None:
                    self._queue(work, drafts, result, start, self._decodes)
                elif work:
                    self._run(work, drafts, result)
            result.done = computed
        except Abandoned:  # by those who had to be computed; others may have had a token ahead
            result.done = computed - {piece.sequence for piece in work}
            result.representative = False
            if self._decodes is not None:
                result.finish = _nothing
        except Exception as error:
            for piece in pieces:
                piece.sequence.request.fail(error)
            self._check_device()
            return StepResult(step)
        if result.finish is None and result.representative:
            result.seconds = time.perf_counter() - start
        return result

    def _catch_up(self, pieces: list[Piece]) -> bool:
        """On a device: wait for earlier steps, if this one depends on what came of them.

        Returns:
            Whether so few decode there that guesses of theirs may be checked.
        """
        if self._decodes is None:
            return False
        while self._unfinished and self._unfinished[0].done:
            self._unfinished.popleft()
        few = sum(piece.decodes_on_device for piece in pieces) <= CHECK_SEQUENCES
        checks = any(step.checks for step in self._unfinished)
        if checks or (few and any(map(_looks_back, pieces))):
            while self._unfinished:
                self._unfinished[0]()
                self._unfinished.popleft()
        return few

    def _queue(
        self,
        work: list[Piece],
        drafts: dict[Piece, list[int]],
        result: StepResult,
        start: float,
        decodes: DecodeStep,
    ) -> None:
        """Queue a step on a device; `finish` takes what it samples there."""
        device = self._device
        assert isinstance(device, StreamDevice)
        if not work:
            result.finish = _nothing
            return
        sampled, ran = work, None
        with device.step():
            if all(piece.decodes_on_device for piece in work):
                ran = decodes.run(
                    [self._decode_row(piece, drafts.get(piece, []), decodes) for piece in work]
                )
            if ran is None:
                self._run(work, drafts, result)
                sampled, drawn, own = self._drawn
            else:
                drawn, own = ran
            fetched = device.fetch(drawn)

        def take() -> None:
            try:
                tokens = fetched()
            except Exception as error:
                raise _broken(device, error) from error
            begin, self._finished = max(start, self._finished), time.perf_counter()
            if result.representative:
                result.seconds = self._finished - begin
            for piece, rows in zip(sampled, own, strict=True):
                chosen = [tokens[row] for row in rows]
                result.take_drawn(piece, drafts.get(piece, []), chosen)

        checks = any(piece in drafts for piece in sampled)
        result.finish = _Unfinished(take, checks)
        self._unfinished.append(result.finish)

    def _decode_row(self, piece: Piece, draft: list[int], decodes: DecodeStep) -> DecodeRow:
        assert piece.sequence.cache is not None, "a planned sequence is open"
        scales = [
            self._rotary.logit_scale(self._temperature(piece.sequence, position))
            for position in range(piece.begin, piece.end + len(draft))
        ]
        draws = self._draws(piece, draft, decodes.sampler)
        return DecodeRow(piece.sequence.cache, _token(piece), draws, scales, draft)

    def _check_device(self) -> None:
        """After an error: raises BackendError if it was a kernel's, which no request survives."""
        if isinstance(self._device, StreamDevice):
            try:
                with self._device.scope():
                    self._device.record().synchronize()
            except Exception as error:
                raise _broken(self._device, error) from error

    def _draws(self, piece: Piece, draft: list[int], sampler: DeviceSampler) -> list[Draw]:
        """How the tokens after a piece and its guess are sampled on the device."""
        sequence = piece.sequence
        assert sequence.cache is not None and sequence.sampler is not None
        draws = [
            Draw(sequence.cache.row, piece.end - 1 + i, sequence.sampler, draft[:i], bool(draft))
            for i in range(len(draft) + 1)
        ]
        sampler.admit(draws[0], sequence.preemptions, sequence.tokens, sequence.prompt_len)
        return draws

    def _run(self, work: list[Piece], drafts: dict[Piece, list[int]], result: StepResult) -> None:
        """Compute pieces of any kind, and guesses behind some of them."""
        # by length, for calls of the op for few rows; a stable order
        work.sort(key=lambda piece: len(drafts.get(piece, ())) if piece.decode else 1 << 30)
        segments = [s for piece in work for s in self._segments(piece, len(drafts.get(piece, ())))]
        batch = Batch(self._rotary, self._cache, segments)
        wanted = _wanted_rows(work, drafts)
        rows = None if len(wanted) == len(batch) else torch.tensor(wanted, dtype=torch.int64)
        with batch.in_cache():
            hidden = self._model.forward(
                self._token_ids(work, drafts), batch, rows, self._progress.reporter(work)
            )
        samples: list[tuple[Piece, int]] = []  # and how many rows
        sampled_rows: list[int] = []
        drawn: list[Piece] = []  # those that are sampled on the device
        drawn_rows: list[int] = []
        row = 0
        for piece in work:
            count = _rows_of(piece, drafts)
            if piece.is_scored:
                self._score(piece, hidden[row : row + count])
            row += count
            own = row - 1 - len(drafts.get(piece, ())), row
            if self._decodes and piece.sampled_on_device:
                drawn.append(piece)
                drawn_rows.extend(range(*own))
            elif piece.sample:
                samples.append((piece, own[1] - own[0]))
                sampled_rows.extend(range(*own))
        if self._decodes:
            sampler = self._decodes.sampler
            self._drawn = self._sample_on_device(sampler, hidden, drawn_rows, drawn, drafts)
        if samples:
            logits = self._model.logits(hidden[self._device.put(torch.tensor(sampled_rows))])
            blocks = torch.split(logits.cpu(), [count for _, count in samples])
            for (piece, _), some in zip(samples, blocks, strict=True):
                result.sample(piece, drafts.get(piece, []), some)

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
        self,
        sampler: DeviceSampler,
        hidden: Tensor,
        rows: list[int],
        pieces: list[Piece],
        drafts: dict[Piece, list[int]],
    ) -> tuple[list[Piece], Tensor, list[range]]:
        """The tokens after some pieces and guesses, from their rows of the final hidden states.

        Returns:
            The pieces, the tokens of all of them on the device, and which are each one's.
        """
        put = self._device.put
        draws: list[Draw] = []
        own = []
        for piece in pieces:
            mine = self._draws(piece, drafts.get(piece, []), sampler)
            own.append(range(len(draws), len(draws) + len(mine)))
            draws += mine
        if not draws:
            return pieces, hidden.new_empty(0, dtype=torch.int64), own
        settings = Settings.of(draws, sampler.spare_row, max(map(len, own)) - 1)
        self._model.logits(hidden[put(torch.tensor(rows))], sampler.logits(len(rows)))
        return pieces, sampler.sample(Settings(*map(put, vars(settings).values()))), own

    def _segments(self, piece: Piece, drafted: int) -> list[Segment]:
        """A piece, cut where the temperature changes; one with a guess behind it is not."""
        sequence, cache = piece.sequence, piece.sequence.cache
        assert cache is not None, "a planned sequence is open"
        if drafted:
            end = piece.end + drafted
            each = tuple(self._temperature(sequence, i) for i in range(piece.begin, end))
            return [Segment(cache, piece.begin, end, each[0], few=each)]
        uniform = min(piece.end, max(piece.begin, sequence.prompt_len))
        segments = []
        if uniform > piece.begin:
            s = self._temperature(sequence, piece.begin)
            segments.append(Segment(cache, piece.begin, uniform, s, sequence.request.sparse))
        # output that is computed anew, or decode
        for position in range(uniform, piece.end):
            s = self._temperature(sequence, position)
            if segments and segments[-1].temperature == s and segments[-1].sparse is None:
                segments[-1] = Segment(cache, segments[-1].begin, position + 1, s)
            else:
                segments.append(Segment(cache, position, position + 1, s))
        return segments

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


def _broken(device: StreamDevice, error: Exception) -> BackendError:
    return BackendError(f"{device.name}: work on the device has failed: {error}")


def _nothing() -> None:
    pass


def _looks_back(piece: Piece) -> bool:
    """Whether a guess is wanted behind it, of a sample whose tokens come from a device."""
    speculator = piece.sequence.speculator
    if speculator is None or speculator.pauses or speculator.covers(piece.sequence.preemptions):
        return False
    return piece.decodes_on_device


def _token(piece: Piece) -> int:
    """The token of a decode piece, or the one that waits on the device."""
    tokens, cache = piece.sequence.tokens, piece.sequence.cache
    assert cache is not None, "a planned sequence is open"
    return tokens[piece.begin] if piece.begin < len(tokens) else waiting(cache.row)


def _rows_of(piece: Piece, drafts: dict[Piece, list[int]]) -> int:
    """How many final hidden states of a piece and its guess are wanted: the last ones."""
    if piece.is_scored:
        return piece.end - piece.begin
    return int(piece.sample) + len(drafts.get(piece, ()))


def _wanted_rows(pieces: list[Piece], drafts: dict[Piece, list[int]]) -> list[int]:
    rows: list[int] = []
    end = 0
    for piece in pieces:
        end += piece.end - piece.begin + len(drafts.get(piece, ()))
        rows.extend(range(end - _rows_of(piece, drafts), end))
    return rows
