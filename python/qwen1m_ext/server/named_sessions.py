"""Sessions that clients name: open ones in the cache, saved ones on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import SessionFileError
from ..session_files import (
    SessionInfo,
    list_sessions,
    load_session,
    remove_session,
    save_session,
    session_path,
)
from ..sessions import Session
from .errors import ApiError

PATIENCE_SECONDS = 2.0
"""How long saving and closing wait for a request that is just ending."""


@dataclass
class _Open:
    session: Session
    users: int = 0  # requests that run in it or wait for it
    saving: bool = False
    created: float = field(default_factory=time.time)


class NamedSessions:
    """Used on the event loop's thread; what touches files is given to `work`."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the saved sessions."""
        self.directory = directory
        self._open: dict[str, _Open] = {}

    def open(self, engine: Engine, name: str, freeze_temperature: bool) -> dict[str, Any]:
        """A new, empty session."""
        self._check_new(name)
        session = engine.open_session(freeze_temperature=freeze_temperature)
        self._open[name] = _Open(session)
        return self.describe(name)

    def use(self, name: str, alone: bool) -> tuple[Session, Callable[[], None]]:
        """(session, what to call when the request has ended); `alone`: while nobody else does."""
        entry = self._get(name)
        if alone and entry.users:
            raise ApiError(409, f"session: {name!r} is in use", param="session")
        if entry.saving:
            raise ApiError(409, f"session: {name!r} is being saved", param="session")
        entry.users += 1

        def done() -> None:
            entry.users -= 1

        return entry.session, done

    async def close(self, name: str) -> None:
        """Give its pages back; the file, if there is one, stays."""
        entry = self._get(name)
        await self._until_idle(name, entry)
        del self._open[name]
        entry.session.close()

    async def save(self, engine: Engine, name: str, work: Any) -> SessionInfo:
        """Write an open session to disk."""
        entry = self._get(name)
        await self._until_idle(name, entry)
        entry.saving = True
        try:
            info: SessionInfo = await work(
                lambda: save_session(engine, entry.session, self.directory, name)
            )
        finally:
            entry.saving = False
        return info

    async def load(self, engine: Engine, name: str, work: Any) -> dict[str, Any]:
        """Open a session from its file."""
        self._check_new(name)
        path = session_path(self.directory, name)
        if not path.is_file():
            raise ApiError(404, f"session: there is no saved session {name!r}", param="session")
        session = await work(lambda: load_session(engine, path))
        if name in self._open:
            session.close()
            raise ApiError(409, f"session: {name!r} was opened meanwhile", param="session")
        self._open[name] = _Open(session)
        return self.describe(name)

    def remove(self, name: str) -> None:
        """Delete the file of a session."""
        try:
            remove_session(self.directory, name)
        except FileNotFoundError:
            message = f"session: there is no saved session {name!r}"
            raise ApiError(404, message, param="session") from None

    def describe(self, name: str) -> dict[str, Any]:
        """An open session."""
        entry = self._get(name)
        session = entry.session
        return {
            "id": name,
            "object": "session",
            "created": int(entry.created),
            "num_tokens": len(session.token_ids),
            "requests": entry.users,
            "freeze_temperature": session.freeze_temperature,
            "temperature": session.temperature,
        }

    def open_ones(self) -> list[dict[str, Any]]:
        """Every open session."""
        return [self.describe(name) for name in self._open]

    def saved_ones(self) -> list[dict[str, Any]]:
        """Every file; one that cannot be read comes with its `error`."""
        return [
            {"error": str(entry)}
            if isinstance(entry, SessionFileError)
            else {"id": entry.name, "object": "saved_session"} | asdict(entry)
            for entry in list_sessions(self.directory)
        ]

    def _get(self, name: str) -> _Open:
        if name not in self._open:
            raise ApiError(404, f"session: there is no open session {name!r}", param="session")
        return self._open[name]

    def _check_new(self, name: str) -> None:
        session_path(self.directory, name)  # a name that can be saved
        if name in self._open:
            raise ApiError(409, f"session: {name!r} is already open", param="session")

    async def _until_idle(self, name: str, entry: _Open) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while entry.users or entry.saving:
            if time.monotonic() > end:
                raise ApiError(409, f"session: {name!r} is in use", param="session")
            await asyncio.sleep(0.02)
        if self._open.get(name) is not entry:
            raise ApiError(404, f"session: there is no open session {name!r}", param="session")
