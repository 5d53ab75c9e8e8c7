"""A parent that holds the port and starts the server again when it dies.

The parent imports nothing heavy and computes nothing, so it outlives what kills a server: lack of
memory, a crash in a driver, kill -9. Clients of the dead process see their connections end at once;
new ones find the port open, wait in its queue, and are answered by the next process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from ..errors import BackendError

CRASHED = 70
"""Exit status of a server whose engine has failed (EX_SOFTWARE): start it again."""

YOUNG_SECONDS = 30.0
MOST_YOUNG_DEATHS = 3
"""So many deaths in a row within so many seconds of their start: it is no use."""


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


def supervise(serve: Callable[[], int]) -> int:
    """Run `serve` in a child process until it ends by itself; returns its exit status.

    The child is a fork: call this before threads are started. Its own exceptions pass through this
    function like its result. SIGTERM and SIGINT are handed on to it.
    """
    young_deaths = 0
    stopping = False
    child = 0

    def hand_on(sig: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child:
            os.kill(child, sig)

    before = {sig: signal.signal(sig, hand_on) for sig in (signal.SIGTERM, signal.SIGINT)}
    while True:
        started = time.monotonic()
        lifeline, held = os.pipe()
        child = os.fork()
        if child == 0:
            for sig, handler in before.items():
                signal.signal(sig, handler)
            os.setpgid(0, 0)  # Ctrl-C reaches it through the parent only, once
            os.close(held)
            threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
            return serve()
        os.close(lifeline)
        _, status = os.waitpid(child, 0)
        os.close(held)
        code = os.waitstatus_to_exitcode(status)
        if stopping or code not in (CRASHED, *(-sig for sig in signal.valid_signals())):
            return code if code >= 0 else 1
        young_deaths = young_deaths + 1 if time.monotonic() - started < YOUNG_SECONDS else 0
        what = "its engine failed" if code == CRASHED else f"signal {-code}"
        if young_deaths >= MOST_YOUNG_DEATHS:
            print(f"qwen1m: the server died again ({what}); giving up", file=sys.stderr)
            return 1
        print(f"qwen1m: the server died ({what}); starting it again", file=sys.stderr, flush=True)


def _end_with_parent(lifeline: int) -> None:
    """Returns from the read when the parent is gone, whatever took it."""
    os.read(lifeline, 1)
    os._exit(1)
