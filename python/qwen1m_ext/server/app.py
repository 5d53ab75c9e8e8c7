"""The application: every endpoint around one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from . import chat_api, completions_api, info_api, sessions_api
from .errors import install_handlers
from .gate import Gate
from .service import Service
from .settings import Settings


def create_app(
    settings: Settings, on_loaded: Callable[[Service], None] | None = None
) -> tuple[FastAPI, Service]:
    """The ASGI application and its state. The model is loaded when the application starts.

    Args:
        settings: of the server.
        on_loaded: called when the model has been loaded, or could not be (`Service.failure`).
    """
    service = Service(settings)

    async def load() -> None:
        await service.load()
        if on_loaded:
            on_loaded(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading
        await service.close()

    app = FastAPI(
        title="qwen1m_ext", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None
    )
    install_handlers(app)
    app.add_middleware(Gate, settings=settings)
    for api in (chat_api, completions_api, info_api, sessions_api):
        app.include_router(api.router(service))
    return app, service
