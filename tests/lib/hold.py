"""An engine that waits for the test, so that no test depends on who is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen1m_ext.engine import Engine

PATIENCE = 300.0
"""Seconds until a wait is given up. Only a broken test meets it, however slow the machine is."""


@contextmanager
def held(engine: Engine, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Within it the model computes nothing, until a condition is met for the first time."""
    runner, free = engine._core.runner, False
    run = runner.run

    def run_when_free(step: Any) -> Any:
        nonlocal free
        end = time.monotonic() + PATIENCE
        while not free and time.monotonic() < end:
            free = until()
            time.sleep(0.001)
        return run(step)

    runner.run = run_when_free  # type: ignore[method-assign]
    try:
        yield
    finally:
        free = True
        runner.run = run  # type: ignore[method-assign]


def together(engine: Engine, requests: int) -> Any:
    """Within it the model waits until so many requests are with the engine."""
    return held(engine, lambda: len(engine._core.requests) >= requests)
