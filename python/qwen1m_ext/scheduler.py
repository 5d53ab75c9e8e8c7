"""What runs next: continuous batching over the paged cache, as plain logic without threads.

`plan` decides one step from counts alone: it never needs a sampled token, so it can run one step
ahead of the model. `retire` takes in what became of a step; `residency.finish` that a sample is
complete, perhaps one step late: what was computed beyond it is given back.

A step holds one token of every sequence that decodes, and prefill up to a number of rows and up to
the latency cap. While a long prompt is prefilled, a share of that goes to short ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cost_model import CostModel
from .errors import ConfigError
from .ops import PAGE_SIZE
from .residency import Residency
from .sequence import Piece, Request, Sequence, Step

MIN_CHUNK_TOKENS = PAGE_SIZE
"""A prefill whose turn it is gets at least so many tokens, whatever the latency cap says."""

SHORT = 0.5
"""A prefill counts as short beside one that has at least twice as much work left."""


@dataclass(frozen=True)
class Limits:
    """What the user chose. Raises ConfigError on a value that is not possible."""

    chunk_tokens: int  # rows of a step
    max_itl_ms: float | None = None  # most a step may take while something decodes
    max_chunk_ms: float | None = None  # the same while nothing decodes
    max_num_seqs: int = 64  # running at once
    short_share: float = 0.5  # of a step's prefill: for short prompts beside a long one

    def __post_init__(self) -> None:
        """Check every value."""
        if self.chunk_tokens < 1:
            raise ConfigError(f"prefill_chunk_tokens: expected >= 1, got {self.chunk_tokens}")
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs: expected >= 1, got {self.max_num_seqs}")
        if not 0 < self.short_share < 1:
            raise ConfigError(f"short_share: expected a number in (0, 1), got {self.short_share}")
        for name in ("max_itl_ms", "max_chunk_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected a number > 0 or None, got {value}")


class Scheduler:
    """Plans steps. Not thread-safe."""

    def __init__(self, residency: Residency, cost: CostModel, limits: Limits) -> None:
        """Plan for the sequences of `residency`."""
        self.residency, self.cost, self.limits = residency, cost, limits
        self.steps = 0
        self._owed = False

    def add(self, request: Request) -> None:
        """Queue the samples of a request."""
        for sequence in request.samples:
            self.residency.wait(sequence)

    def retire(self, step: Step, done: frozenset[Sequence], seconds: float | None) -> None:
        """A step has left the runner.

        Args:
            step: as planned.
            done: the sequences whose piece was computed; others were skipped, as stopped.
            seconds: how long the whole step took; None: do not learn from it.
        """
        for piece in step.pieces:
            sequence = piece.sequence
            sequence.in_flight -= 1
            if sequence in done:
                sequence.computed = piece.end
                self.residency.offer(sequence)
                if sequence.is_leader and piece.end >= sequence.prompt_len:
                    self.residency.prefilled(sequence)
            if sequence.stopping:
                self.residency.settle(sequence)
        if seconds is not None and len(done) == len(step.pieces):
            self.cost.observe((piece.work for piece in step.pieces), seconds)

    def plan(self) -> Step | None:
        """The next step, its pages taken; None if there is nothing to run now."""
        pieces: list[Piece] = []
        for sequence in sorted(self.residency.running, key=lambda s: s.key):
            # a preemption by one before it may have changed its state
            ready = sequence.decoding and not sequence.complete and not sequence.stopping
            if ready and self.residency.reserve(sequence, 1, _in(pieces)):
                pieces.append(self._take(sequence, 1))
        self._prefills(pieces)
        if not pieces:
            return None
        self.steps += 1
        return Step(self.steps, pieces)

    def _prefills(self, pieces: list[Piece]) -> None:
        """Add prefill pieces: short prompts up to their share, the oldest, then the others."""
        candidates = [s for s in self.residency.running if not s.decoding and not s.stopping]
        candidates += self.residency.startable()
        if not candidates:
            return
        candidates.sort(key=lambda s: s.key)
        oldest, others = candidates[0], candidates[1:]
        left = self._work_left(oldest)
        short = [
            s
            for s in others
            if s.request.priority == oldest.request.priority and self._work_left(s) < SHORT * left
        ]
        short.sort(key=lambda s: (self._work_left(s), s.key))
        rows, seconds = self.limits.chunk_tokens, self._cap(pieces)
        if self._owed:  # a segment that cannot be cut found no room beside the short ones
            short = []
        share = self.limits.short_share
        used, spent = self._fill(short, int(share * rows), share * seconds, pieces)
        rows, seconds = rows - used, seconds - spent
        first = len(pieces)
        used, spent = self._fill([oldest], rows, seconds, pieces, floor=True)
        self._owed = bool(short) and len(pieces) == first and oldest.request.policy.sparse
        rows, seconds = rows - used, seconds - spent
        planned = _in(pieces)
        self._fill([s for s in others if s not in planned], rows, seconds, pieces)

    def _cap(self, pieces: list[Piece]) -> float:
        """Predicted seconds that prefill may add to a step with these decodes."""
        limit = self.limits.max_itl_ms if pieces else self.limits.max_chunk_ms
        if limit is None:
            return math.inf
        decodes = self.cost.seconds(piece.work for piece in pieces)
        return limit / 1e3 / self.cost.lateness - decodes

    def _fill(
        self,
        sequences: list[Sequence],
        rows: int,
        seconds: float,
        pieces: list[Piece],
        floor: bool = False,
    ) -> tuple[int, float]:
        """Give tokens to sequences in order; returns (rows, seconds) that were used."""
        used, spent = 0, 0.0
        for sequence in sequences:
            room = rows - used
            if room < 1 or (seconds - spent <= 0 and not floor):
                break
            if sequence.cache is None and not self.residency.admit(sequence):
                continue
            count = self._chunk(sequence, room, seconds - spent, floor or not used)
            if count < 1 or not self.residency.reserve(sequence, count, _in(pieces)):
                continue
            piece = self._take(sequence, count)
            pieces.append(piece)
            used += count
            if not math.isinf(seconds):
                spent += self.cost.prefill_seconds(piece.begin, piece.end, piece.work.sparse)
        return used, spent

    def _chunk(self, sequence: Sequence, room: int, seconds: float, floor: bool) -> int:
        """Tokens of a sequence's next piece; 0: none fits."""
        begin, total = sequence.length, sequence.total
        policy = sequence.request.policy
        fits = self.cost.chunk(begin, max(0.0, seconds), policy.sparse)
        if floor:
            fits = max(fits, MIN_CHUNK_TOKENS)
        capped = fits < min(room, total - begin)
        end = min(total, begin + min(room, fits))
        if capped and end - begin >= 2 * PAGE_SIZE:
            end -= end % PAGE_SIZE  # whole pages can be shared
        if begin >= sequence.prompt_len:
            return end - begin  # tokens of the output, computed anew: always dense
        end = policy.chunk_end(begin, min(end, sequence.prompt_len), sequence.prompt_len)
        return end - begin if end - begin <= room else 0

    def _take(self, sequence: Sequence, count: int) -> Piece:
        """Put tokens of a sequence, with their pages, into the step being planned."""
        end = sequence.length
        piece = Piece(sequence, end - count, end, sample=end == sequence.total)
        sequence.in_flight += 1
        if piece.sample:
            sequence.total += 1
        return piece

    # --- the end of a sequence --------------------------------------------------------------------

    def _work_left(self, sequence: Sequence) -> float:
        begin = sequence.length
        return self.cost.prefill_seconds(begin, sequence.total, sequence.request.policy.sparse)


def _in(pieces: list[Piece]) -> set[Sequence]:
    return {piece.sequence for piece in pieces}
