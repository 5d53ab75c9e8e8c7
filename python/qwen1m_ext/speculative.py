"""n-gram (prompt-lookup) speculation: guess the next tokens, let the model check all at once.

The guess is what followed the last few tokens when they last occurred, in prompt or output. The
model computes the guessed tokens together with the one that is due, and each is sampled in turn
from its own logits, exactly as it would have been one step at a time: the first that differs from
the guess ends the check, and what was guessed behind it is dropped. So a guess never changes what
is sampled, at any temperature, only how many tokens a step yields.

The scheduler does not know: it plans one token per step. Tokens that were checked ahead wait here,
with their keys and values in the sequence's pages, and the steps planned for them cost nothing.

Source: prompt lookup decoding (Saxena, 2023); sampling by comparison is the rejection rule of
speculative sampling (Leviathan et al., arXiv:2211.17192) for a guess that is certain of itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .sampler import Candidates

MAX_DRAFT = 15
"""Most tokens of a guess: with the one that is due, 16 rows."""

MIN_MATCH, MAX_MATCH = 2, 8
"""Tokens at the end that have to occur before, and at most so many are compared."""

MAX_PAUSE = 32
"""Most steps without a guess, after guesses that were wrong at once."""

MAX_REST = 7
"""Most steps without a look, after looks that found nothing, where a look has a price."""


class NgramSpeculator:
    """The guesses of one sample, and what was sampled ahead of the scheduler."""

    def __init__(self) -> None:
        self.ahead: deque[tuple[int, Candidates | None]] = deque()  # sampled, not yet due
        self._epoch = -1  # preemptions of the sequence when these were computed
        self._seen = np.empty(256, np.int32)
        self._count = 0  # of `_seen`
        self._length = 4  # of the next guess
        self._wrong = 0  # guesses in a row whose first token was wrong
        self._pause = 0  # steps
        self._found_nothing = 0  # looks in a row

    @property
    def pauses(self) -> bool:
        """Whether the next guess is left out, whatever the tokens are."""
        return self._pause > 0

    def covers(self, epoch: int) -> bool:
        """Whether the token that is due is computed, and the one after it sampled, already.

        A preemption takes the keys and values away; what was sampled stays.
        """
        return bool(self.ahead) and epoch == self._epoch

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """Tokens that may follow, at most `room`.

        Args:
            tokens: prompt and output; only grows from call to call.
            room: 0 or more.
        """
        if self._pause:
            self._pause -= 1
            return []
        self._extend(tokens)
        count = min(self._length, room)
        seen = self._seen[: self._count]
        if count < 1 or len(seen) <= MIN_MATCH:
            return []
        # places before the last token that hold it; then those with the token before it, too
        places = np.flatnonzero(seen[:-1] == seen[-1])
        for back in range(1, MAX_MATCH):
            longer = places[places >= back]
            if len(longer):
                longer = longer[seen[longer - back] == seen[-1 - back]]
            if not len(longer):
                if back < MIN_MATCH:
                    return []
                break
            places = longer
        start = int(places[-1]) + 1
        draft: list[int] = seen[start : start + count].tolist()
        while len(draft) < count:  # the end repeats itself: go on repeating
            draft.append(draft[len(draft) - (len(seen) - start)])
        return draft

    def look_seldom(self, found: bool) -> None:
        """After a look that something waited for: looks that find nothing become rare."""
        self._found_nothing = 0 if found else self._found_nothing + 1
        if self._found_nothing:
            self._pause = min(MAX_REST, 1 << (self._found_nothing - 1))

    def keep(self, epoch: int, drafted: int, chosen: list[tuple[int, Candidates | None]]) -> None:
        """Take in a check.

        Args:
            epoch: preemptions of the sequence so far.
            drafted: tokens of the guess.
            chosen: the token after the one that was due and those ahead, with their log
                probabilities; all but the last agree with the guess.
        """
        self.ahead.extend(chosen[1:])
        self._epoch = epoch
        accepted = len(chosen) - 1
        if not drafted:
            return
        if accepted == drafted:
            self._length = min(MAX_DRAFT, 2 * self._length)
        else:
            self._length = accepted + 1
        self._wrong = 0 if accepted else self._wrong + 1
        if self._wrong:
            self._pause = min(MAX_PAUSE, 1 << (self._wrong - 1))
            self._length = 2

    def _extend(self, tokens: Sequence[int]) -> None:
        n = len(tokens)
        if n > len(self._seen):
            grown: NDArray[np.int32] = np.empty(max(n, 2 * len(self._seen)), np.int32)
            grown[: self._count] = self._seen[: self._count]
            self._seen = grown
        self._seen[self._count : n] = tokens[self._count : n]
        self._count = n
