"""Prefix cache: which pages hold which beginning of a text, by a chain of hashes.

The key of a page is the hash of the page before it and of its own 128 tokens, so equal keys mean
equal texts from the first token on. The root of the chain holds everything else that cached keys
and values depend on: the model, and the attention they were computed with (temperature, policy).
Up to the trained length the temperature is 1 and any common prefix is shared; beyond it the
temperature is that of one prompt length, so a repeated prompt hits and one of another length does
not: nothing computed under another temperature is ever reused.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from .errors import RequestError
from .kv_cache import BlockAllocator
from .ops import PAGE_SIZE

PINNED_SHARE = 0.5
"""Of the pages of a pool: what pins may hold at most, so that requests still find room."""


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], end: int) -> None:
    """Append the keys of the pages that lie wholly within the first `end` tokens."""
    for page in range(len(keys), end // PAGE_SIZE):
        content = array("I", tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]).tobytes()
        keys.append(_hash(keys[-1] if keys else root, content))


class PrefixCache:
    """Finds, offers and pins the pages of prefixes in a pool."""

    def __init__(self, allocator: BlockAllocator, model_key: bytes, enabled: bool = True) -> None:
        """`model_key`: stands for weights, positions and cache format."""
        self._allocator, self._model_key, self.enabled = allocator, model_key, enabled
        self._pins: dict[str, list[int]] = {}  # name -> pages

    def root(self, temperature: float, policy: str) -> bytes:
        """Root of the chains computed under a temperature s and an attention policy."""
        return _hash(self._model_key, f"{policy} s={temperature!r}".encode())

    def match(self, keys: Sequence[bytes], max_tokens: int) -> list[int]:
        """Take the cached pages of the longest prefix of at most `max_tokens` tokens."""
        if not self.enabled:
            return []
        return self._allocator.share(keys[: max_tokens // PAGE_SIZE])

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], begin: int) -> None:
        """Let others find computed pages: `keys[begin:]` are those of `pages[begin:]`."""
        if self.enabled:
            for key, page in zip(keys[begin:], pages[begin : len(keys)], strict=True):
                self._allocator.label(page, key)

    def check_pin(self, num_pages: int) -> None:
        """Refuse a pin that would leave too little room.

        Raises:
            RequestError: pins would hold more than `PINNED_SHARE` of the pool.
        """
        limit = int(PINNED_SHARE * self._allocator.num_pages)
        if self.num_pinned + num_pages > limit:
            raise RequestError(
                f"pin: expected at most {limit} pinned pages ({PINNED_SHARE:.0%} of the cache), "
                f"got {num_pages} beside {self.num_pinned}"
            )

    def pin(self, name: str, keys: Sequence[bytes]) -> None:
        """Keep the cached pages of a prefix until `unpin(name)`. Raises as `check_pin`."""
        self.check_pin(len(keys))
        self._pins.setdefault(name, []).extend(self._allocator.share(keys))

    def unpin(self, name: str) -> bool:
        """Undo `pin`; False if nothing of that name is pinned."""
        pages = self._pins.pop(name, None)
        self._allocator.free(pages or [])
        return pages is not None

    @property
    def num_pinned(self) -> int:
        """Pages that pins hold (a page of two pins counts twice)."""
        return sum(map(len, self._pins.values()))


def _hash(parent: bytes, content: bytes) -> bytes:
    return blake2b(parent + content, digest_size=32).digest()
