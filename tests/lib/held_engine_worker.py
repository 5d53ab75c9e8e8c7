"""`qwen1m serve`, whose engine tests can hold, so that none has to hope that something is slow.

    python tests/lib/held_engine_worker.py serve ...

The environment variable QWEN1M_HOLD names a file. While there is a number in it, no step that takes
a prompt beyond so many tokens is computed, unless it has been cancelled; while it says "load", an
engine does not begin to load; while it says "watch", nobody minds that an engine is silent. Without
the file everything runs as always. Started without "serve" this is the engine's process itself, see
`qwen1m_ext.engine_child`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

HOLD = Path(os.environ["QWEN1M_HOLD"])


def held_at() -> str:
    """What stands in the file; empty without one."""
    try:
        return HOLD.read_text()
    except FileNotFoundError:
        return ""


def is_held(step: Any) -> bool:
    """Whether a step has to wait."""
    words = held_at()
    return words.isdigit() and any(
        piece.begin < piece.sequence.prompt_len
        and piece.end > int(words)
        and not piece.sequence.request.stopped
        for piece in step.pieces
    )


def serve() -> int:
    """The server, with this file as its engine's command."""
    from qwen1m_ext.cli import main
    from qwen1m_ext.engine_process import EngineProcess
    from qwen1m_ext.heartbeat import Silence

    look = Silence.look

    def look_when_allowed(self: Silence, tick: float) -> str | None:
        return None if held_at() == "watch" else look(self, tick)

    Silence.look = look_when_allowed  # type: ignore[method-assign]
    EngineProcess.command = (sys.executable, __file__)
    return main(sys.argv[1:])


def work() -> None:
    """The engine."""
    while held_at() == "load":
        time.sleep(0.01)
    from qwen1m_ext.engine_worker import main
    from qwen1m_ext.runner import ModelRunner

    run = ModelRunner.run

    def run_when_allowed(self: Any, step: Any) -> Any:
        while is_held(step):
            self.pulse.beat()  # held is not stuck
            time.sleep(0.005)
        return run(self, step)

    ModelRunner.run = run_when_allowed  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        del sys.path[0]  # this folder
        raise SystemExit(serve())
    sys.path[:] = sys.argv[2:]
    work()
