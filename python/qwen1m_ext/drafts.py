"""Which guesses a step checks: as many as rows, pages and memory have room for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from .model import Qwen2Model, logits_rows
from .ops import PAGE_SIZE
from .sequence import Piece


class Drafter:
    """Asks the speculators of a step's samples, see `speculative.py`."""

    def __init__(self, model: Qwen2Model, device: bool) -> None:
        """Prepare for a model's workspace; `device`: logits may stay on one."""
        self._device = device
        self._rows, self._logits = model.workspace.chunk_tokens, logits_rows(model.config)

    def guesses(self, work: Sequence[Piece], few: bool) -> dict[Piece, list[int]]:
        """What is guessed behind the pieces of a step, if anything is.

        few: whether samples that are drawn on a device may be guessed for, up to `MAX_DRAFT` tokens
            of each: their tokens have been waited for, and there is room for their draws.
        """
        spare = self._rows - sum(p.end - p.begin for p in work)
        logits = self._logits - sum(p.sample for p in work)
        drafts = {}
        for piece in work:
            sequence, cache, sampler = piece.sequence, piece.sequence.cache, piece.sequence.sampler
            speculator = sequence.speculator
            if speculator is None or cache is None or sampler is None or speculator.ahead:
                continue
            if not (piece.decode and piece.sample) or sampler.stops_at(sequence.tokens[-1]):
                continue
            on_device = self._device and piece.sampled_on_device
            if on_device and not few:
                continue
            room = min(
                spare,
                spare if on_device else logits,
                len(cache.pages) * PAGE_SIZE - piece.end,
                sequence.prompt_len + sequence.max_tokens - piece.end - 1,
            )
            paused = speculator.pauses
            guess = speculator.guess(sequence.tokens, max(0, room))
            if on_device and not paused:  # its tokens have been waited for
                speculator.look_seldom(found=bool(guess))
            # behind a token that may be the end nothing is drawn
            draft = list(takewhile(lambda token: not sampler.stops_at(token), guess))  # noqa: B023
            if draft:
                drafts[piece] = draft
                spare -= len(draft)
                logits -= 0 if on_device else len(draft)
        return drafts
