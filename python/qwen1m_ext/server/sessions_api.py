"""/v1/sessions: open, list, save, load, close, delete."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import Response

from .errors import json_response
from .schemas import OpenSessionBody
from .service import Service


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1/sessions")
    sessions = service.sessions

    @routes.get("")
    async def list_all() -> Response:
        """Open sessions and saved ones."""
        saved = await service.work(sessions.saved_ones)
        return json_response({"object": "list", "data": sessions.open_ones(), "saved": saved})

    @routes.post("")
    async def open_one(body: OpenSessionBody) -> Response:
        """Open an empty session; requests use it by the field `session`."""
        opened = await sessions.open(service.engine, body.id, body.freeze_temperature, service.work)
        return json_response(opened, 201)

    @routes.get("/{name}")
    async def describe(name: str) -> Response:
        """One open session."""
        return json_response(sessions.describe(name))

    @routes.post("/{name}/save")
    async def save(name: str) -> Response:
        """Write an open session to disk; it stays open."""
        return json_response(asdict(await sessions.save(service.engine, name, service.work)))

    @routes.post("/{name}/load")
    async def load(name: str) -> Response:
        """Open a saved session, verified."""
        return json_response(await sessions.load(service.engine, name, service.work), 201)

    @routes.delete("/{name}")
    async def close(name: str) -> Response:
        """Close an open session; a saved copy stays."""
        await sessions.close(name)
        return json_response({"id": name, "object": "session", "closed": True})

    @routes.delete("/{name}/saved")
    async def remove(name: str) -> Response:
        """Delete the saved copy."""
        await service.work(lambda: sessions.remove(name))
        return json_response({"id": name, "object": "saved_session", "deleted": True})

    return routes
