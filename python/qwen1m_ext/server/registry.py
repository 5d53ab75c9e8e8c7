"""The requests of the server by id: those that run, and the last ones that did."""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from typing import Any

from .errors import ApiError
from .generation import Generation

REMEMBERED = 256
"""Finished requests whose status can still be asked for."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Registry:
    """Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._live: dict[str, Generation] = {}
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def new_id(self, prefix: str, wanted: str | None) -> str:
        """The id of a new request: the caller's (header X-Request-Id) or a random one.

        Raises:
            ApiError: not usable, or a running request has it.
        """
        if wanted is None:
            return f"{prefix}-{secrets.token_hex(12)}"
        if not _ID.fullmatch(wanted):
            raise ApiError(
                400,
                "X-Request-Id: expected 1 to 128 of A-Z, a-z, 0-9, '.', '_', ':' and '-', the "
                f"first a letter or digit, got {wanted!r}",
            )
        if wanted in self._live:
            raise ApiError(409, f"X-Request-Id: a running request has the id {wanted!r}")
        return wanted

    @property
    def preparing(self) -> int:
        """Requests that are being tokenised: not with the engine yet."""
        return sum(not generation.submitted for generation in self._live.values())

    def add(self, generation: Generation) -> None:
        """A request begins."""
        self._live[generation.request_id] = generation
        self._finished.pop(generation.request_id, None)

    def remove(self, generation: Generation, forget: bool) -> None:
        """A request has ended; `forget` one that was refused."""
        if forget:
            del self._live[generation.request_id]
            return
        status = generation.status()
        if status["state"] != "cancelled":
            status["state"] = "finished"
        del self._live[generation.request_id]
        self._finished[generation.request_id] = status
        while len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)

    def running(self) -> list[dict[str, Any]]:
        """Status of every running request, oldest first."""
        return [generation.status() for generation in self._live.values()]

    def status(self, request_id: str) -> dict[str, Any]:
        """Status of one request. Raises ApiError 404 if it is unknown or forgotten."""
        if request_id in self._live:
            return self._live[request_id].status()
        if request_id in self._finished:
            return self._finished[request_id]
        raise ApiError(404, f"request: there is no {request_id!r}")

    def cancel(self, request_id: str) -> dict[str, Any]:
        """Cancel a running request; returns its status. A finished one stays as it is."""
        if request_id in self._live:
            self._live[request_id].cancel()
        return self.status(request_id)

    def cancel_all(self) -> None:
        """Cancel everything that runs."""
        for generation in self._live.values():
            generation.cancel()
