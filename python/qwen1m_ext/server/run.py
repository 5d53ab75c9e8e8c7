"""The process: uvicorn, the model beside it, and a graceful end."""

from __future__ import annotations

import asyncio
import socket
import sys
from types import FrameType

import uvicorn

from ..config import load_config
from ..errors import BackendError
from .app import create_app
from .service import Service
from .settings import Settings


class Server(uvicorn.Server):
    """First SIGTERM or SIGINT: drain. Second: cancel what runs, then stop.

    While it drains the port stays open: running streams go on, /health and /ready answer, new
    requests get 503, so that a load balancer sees what is happening.
    """

    service: Service
    _signals = 0
    _draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        self._signals += 1
        if self._signals == 1:
            asyncio.get_event_loop().call_soon_threadsafe(self._start_draining)
        else:
            asyncio.get_event_loop().call_soon_threadsafe(self.service.registry.cancel_all)
            self.should_exit = True

    def _start_draining(self) -> None:
        print("qwen1m: shutting down; running requests may finish", file=sys.stderr, flush=True)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self.service.drain(self.service.settings.drain_seconds)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """The listening socket. Raises BackendError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise BackendError(f"serve: cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def run_server(settings: Settings, listener: socket.socket) -> int:
    """Serve on a listening socket until a signal; returns the exit status.

    Raises:
        ConfigError: the checkpoint is none; seen before anything is started.
        Whatever kept the model from being loaded, or from being loaded again.
    """
    load_config(settings.model_dir)

    def loaded(service: Service) -> None:
        if service.failure is not None:
            server.should_exit = True
            return
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(
            f"qwen1m: {settings.served_name} is ready at {url} "
            f"(context {service.engine.max_model_len:,} tokens)",
            file=sys.stderr,
            flush=True,
        )

    app, service = create_app(settings, loaded)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(config)
    server.service = service
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    return 0 if server.started else 1
