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
    """

    def __init__(self, cache: KVCache, freeze_temperature: bool = False) -> None:
        """Take a sequence of the pool; `close` gives it back."""
        self._cache = cache
        self.sequence: SequenceCache = cache.open()
        self.freeze_temperature = freeze_temperature
        self._closed = False
        self.token_ids: list[int] = []  # in the cache, all computed under `temperature`
        self.temperature: float | None = None  # s(n); None: nothing cached yet

    def begin(self, token_ids: Sequence[int], temperature: float) -> tuple[int, float]:
        """Cut the cache back to what a prompt can reuse.

        Args:
            token_ids: the whole prompt.
            temperature: s(n) of a request with this prompt.

        Returns:
            How many leading tokens are reused (less than the prompt's length: the last one must run
            to give logits) and the temperature to use.
        """
        if self.freeze_temperature and self.temperature is not None:
            temperature = self.temperature
        reused = 0
        if temperature == self.temperature:
            limit = min(len(self.token_ids), len(token_ids) - 1)
            while reused < limit and self.token_ids[reused] == token_ids[reused]:
                reused += 1
        self.temperature = temperature
        self.truncate(reused)
        return reused, temperature

    def extend(self, token_ids: Sequence[int], temperature: float) -> None:
        """Note tokens that have entered the cache; under another s they will not be reused."""
        at_end = len(self.token_ids) + len(token_ids) == self.sequence.length
        if temperature == self.temperature and at_end:
            self.token_ids.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.sequence.truncate(length)
        del self.token_ids[length:]

    def close(self) -> None:
        """Give the pages back. Closing twice is harmless."""
        if not self._closed:
            self._cache.close(self.sequence)
            self.token_ids.clear()
            self._closed = True
