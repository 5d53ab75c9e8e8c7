"""Sessions: a cache that outlives a request, so that the next turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kv_cache import KVCache, SequenceCache


class Session:
    """The cached tokens of a conversation and the temperature they were computed with.

    Up to the trained length the temperature s(n) is 1 and any common prefix is reused exactly.
    Beyond it, s depends on the prompt's length, and so do the keys and values of all layers but the
    first: a prompt of another length is prefilled anew, unless the session was opened with
    `freeze_temperature`. Then the s of its first prompt stays for all turns, which equals one
    request with that s.

    What was prefilled sparsely is reused by prompts that are, and up to the last whole window: the
    last rows of a window select for all of it. So it is with what was prefilled densely.

    One request at a time uses a session; others wait for their turn.
    """

    def __init__(self, cache: KVCache, freeze_temperature: bool = False) -> None:
        """Take a sequence of the pool; `close` gives it back."""
        self._cache = cache
        self.sequence: SequenceCache = cache.open()
        self.freeze_temperature = freeze_temperature
        self.busy = False  # a request computes in it
        self.closed = False
        self.token_ids: list[int] = []  # in the cache, all computed under `temperature`
        self.drawn: list[int] = []  # by the last request after them, and not computed
        self.temperature: float | None = None  # s(n); None: nothing cached yet
        self.policy = "dense"  # attention that the tokens were computed with

    def begin(
        self, token_ids: Sequence[int], temperature: float, policy: str = "dense"
    ) -> tuple[int, float]:
        """Cut the cache back to what a prompt can reuse; the session is busy from now on.

        Args:
            token_ids: the whole prompt.
            temperature: s(n) of a request with this prompt.
            policy: the request's attention, by name.

        Returns:
            How many leading tokens are reused (less than the prompt's length: the last one must run
            to give logits) and the temperature to use.
        """
        self.busy = True
        if self.freeze_temperature and self.temperature is not None:
            temperature = self.temperature
        reused = 0
        if (temperature, policy) == (self.temperature, self.policy):
            limit = min(len(self.token_ids), len(token_ids) - 1)
            while reused < limit and self.token_ids[reused] == token_ids[reused]:
                reused += 1
        self.temperature, self.policy = temperature, policy
        self.truncate(reused)
        return reused, temperature

    def end(self, token_ids: Sequence[int], drawn: Sequence[int] = ()) -> None:
        """Take over what a request leaves: these tokens are in the cache, under the same s.

        `drawn` are the output tokens after them: a sample's last one is never computed.
        """
        self.token_ids, self.drawn = list(token_ids), list(drawn)
        self.truncate(len(self.token_ids))
        self.busy = False
        if self.closed:
            self._cache.close(self.sequence)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.sequence.truncate(length)
        del self.token_ids[length:]

    def close(self) -> None:
        """Give the pages back, after the request that runs in it. Closing twice is harmless."""
        if not self.closed:
            self.closed = True
            if not self.busy:
                self._cache.close(self.sequence)
                self.token_ids.clear()
