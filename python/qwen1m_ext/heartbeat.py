"""Signs of life: who is stuck, told apart from who works for long.

A thread says in its `Pulse` when it is at work and whenever it has got on. An `Observer` looks once
a tick and adds up the ticks in which nothing has moved. Ticks and not a clock: a process that was
suspended, or starved of processors together with its observer, has not been stuck meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .errors import ConfigError

PATIENCE = 10.0
"""A step may go without progress for so many times what it is predicted to take in all. A step
says after every layer that it has got on, so that this is some hundred times what is expected."""

START_SECONDS = 600.0
"""Until the first sign of a new process: it reads its modules from disk and cannot speak yet."""


def tick_seconds(timeout: float) -> float:
    """How often to look, given the seconds after which something is to be noticed.

    Raises:
        ConfigError: not a time.
    """
    if not timeout > 0:
        raise ConfigError(f"engine_timeout_seconds: expected a number > 0, got {timeout}")
    return min(1.0, timeout / 8)


class Pulse:
    """One thread's; the thread writes, anybody may read."""

    def __init__(self) -> None:
        self.busy = False
        self.count = 0  # signs of progress
        self.seconds = 0.0  # that the work at hand is predicted to take

    def begin(self, seconds: float = 0.0) -> None:
        """Work begins."""
        self.seconds = seconds
        self.count += 1
        self.busy = True

    def beat(self) -> None:
        """It has got on."""
        self.count += 1

    def end(self) -> None:
        """It is done; waiting for more."""
        self.busy = False


class Observer:
    """Watches threads that work for one another."""

    def __init__(
        self, pulses: Mapping[str, Pulse], waiting: Callable[[], bool], timeout: float
    ) -> None:
        """Watch.

        Args:
            pulses: of the threads, by name.
            waiting: whether somebody waits for them: then one at least has to be at work.
            timeout: least seconds without progress that are too long.
        """
        self._pulses, self._waiting, self._timeout = dict(pulses), waiting, timeout
        self._counts = dict.fromkeys(pulses, -1)
        self._still = dict.fromkeys([*pulses, ""], 0.0)

    def look(self, tick: float) -> str | None:
        """Called every `tick` seconds: says what is stuck; None: nothing."""
        idle = True
        for name, pulse in self._pulses.items():
            count, busy = pulse.count, pulse.busy
            moved, self._counts[name] = count != self._counts[name], count
            idle = idle and not (moved or busy)
            self._still[name] = self._still[name] + tick if busy and not moved else 0.0
        self._still[""] = self._still[""] + tick if idle and self._waiting() else 0.0
        for name, still in self._still.items():
            limit = self._timeout
            if name:
                limit = max(limit, PATIENCE * self._pulses[name].seconds)
            if still >= limit:
                who = f"its {name} made" if name else "requests wait, but it made"
                return f"{who} no progress for {still:.0f} s"
        return None


class Silence:
    """How long nothing has been heard of a process."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds of silence that are too long, once it has spoken."""
        self._timeout = timeout
        self.begin()

    def begin(self) -> None:
        """A new process."""
        self._limit, self._seconds = max(self._timeout, START_SECONDS), 0.0

    def heard(self) -> None:
        """A sign of life."""
        self._limit, self._seconds = self._timeout, 0.0

    def look(self, tick: float) -> str | None:
        """Called every `tick` seconds: says when it is too long."""
        self._seconds += tick
        if self._seconds < self._limit:
            return None
        return f"its process gave no sign of life for {self._seconds:.0f} s"
