"""Sessions that clients name: open ones in the cache, saved ones on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engine_process import EngineProcess, SessionProxy
from ..errors import SessionFileError
from ..session_files import (
    SessionInfo,
    list_sessions,
    remove_session,
    session_path,
)
from .errors import ApiError

PATIENCE_SECONDS = 2.0
"""How long saving and closing wait for a request that is just ending."""


@dataclass
class _Open:
    session: SessionProxy
    users: int = 0  # requests that run in it or wait for it
    saving: bool = False
    created: float = field(default_factory=time.time)


class NamedSessions:
    """Used on the event loop's thread; what touches files is given to `work`."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the saved sessions."""
        self.directory = directory
        self._open: dict[str, _Open] = {}

    async def open(
        self, engine: EngineProcess, name: str, freeze_temperature: bool, work: Any
    ) -> dict[str, Any]:
        """A new, empty session."""
        self._check_new(name)
        session = await work(lambda: engine.open_session(freeze_temperature=freeze_temperature))
        self._add(name, session)
        return self.describe(name)

    def use(self, name: str, alone: bool) -> tuple[SessionProxy, Callable[[], None]]:
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

    async def save(self, engine: EngineProcess, name: str, work: Any) -> SessionInfo:
        """Write an open session to disk."""
        entry = self._get(name)
        await self._until_idle(name, entry)
        entry.saving = True
        try:
            info: SessionInfo = await work(
                lambda: engine.save_session(entry.session, self.directory, name)
            )
        finally:
            entry.saving = False
        return info

    async def load(self, engine: EngineProcess, name: str, work: Any) -> dict[str, Any]:
        """Open a session from its file."""
        self._check_new(name)
        path = session_path(self.directory, name)
        if not path.is_file():
            raise ApiError(404, f"session: there is no saved session {name!r}", param="session")
        session = await work(lambda: engine.load_session(path))
        self._add(name, session)
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
            "num_tokens": session.num_tokens,
            "requests": entry.users,
            "freeze_temperature": session.freeze_temperature,
            "temperature": session.temperature,
        }

    def open_ones(self) -> list[dict[str, Any]]:
        """Every open session."""
        return [self.describe(name) for name, one in self._open.items() if not one.session.lost]

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
        if self._open[name].session.lost:
            message = f"session: {name!r} was lost when the engine had to be restarted"
            raise ApiError(404, message, param="session", code="session_lost")
        return self._open[name]

    def _add(self, name: str, session: SessionProxy) -> None:
        if name in self._open and not self._open[name].session.lost:
            session.close()
            raise ApiError(409, f"session: {name!r} was opened meanwhile", param="session")
        self._open[name] = _Open(session)

    def _check_new(self, name: str) -> None:
        session_path(self.directory, name)  # a name that can be saved
        if name in self._open and not self._open[name].session.lost:
            raise ApiError(409, f"session: {name!r} is already open", param="session")

    async def _until_idle(self, name: str, entry: _Open) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while entry.users or entry.saving:
            if time.monotonic() > end:
                raise ApiError(409, f"session: {name!r} is in use", param="session")
            await asyncio.sleep(0.02)
        if self._open.get(name) is not entry:
            raise ApiError(404, f"session: there is no open session {name!r}", param="session")
