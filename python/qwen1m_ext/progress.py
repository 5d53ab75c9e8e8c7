"""After each layer of a step: how far its prefills are, and whether anybody still wants it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from .device import Device, Event, StreamDevice
from .events import Progress
from .heartbeat import Pulse
from .sequence import Piece

LAYERS_AHEAD = 2
"""Layers of a prefill that may be queued before they run: progress is no farther off."""


class Abandoned(Exception):
    """Nobody wants what is being computed."""


class LayerProgress:
    """Reports to the requests of a step."""

    def __init__(
        self, device: Device, pulse: Pulse, prefill_work: Callable[[int, int, bool], float]
    ) -> None:
        """Prepare.

        Args:
            device: that computes.
            pulse: beats after every layer.
            prefill_work: cost of the prompt tokens [begin, end), dense or sparse, in any unit.
        """
        self._device, self._pulse, self._prefill_work = device, pulse, prefill_work

    def reporter(self, work: list[Piece]) -> Callable[[int, int], None] | None:
        """To be called with (layers done, layers) after each layer of a step; None: nobody cares.

        It raises `Abandoned`, and with a queue keeps the host near what is reported.
        """
        device = self._device
        if not isinstance(device, StreamDevice):
            return lambda done, of: self._report(work, done / of)
        if all(piece.decode for piece in work):
            return None
        queued: deque[Event] = deque()

        def report(done: int, of: int) -> None:
            queued.append(device.record())
            if len(queued) > LAYERS_AHEAD:
                queued.popleft().synchronize()
            self._report(work, done / of)

        return report

    def _report(self, pieces: list[Piece], share: float) -> None:
        """After each layer: progress, and whether anybody still wants the step."""
        self._pulse.beat()
        now = time.perf_counter()
        for piece in pieces:
            sequence, request = piece.sequence, piece.sequence.request
            if piece.begin >= sequence.prompt_len or not sequence.is_leader or request.stopped:
                continue
            total = sequence.prompt_len
            end = min(piece.end, total)
            request.done = piece.begin + share * (end - piece.begin)
            report = request.on_progress
            if report is None or request.started is None:
                continue

            def work(begin: int, end: int, sparse: bool = request.policy.sparse) -> float:
                return self._prefill_work(begin, end, sparse)

            done = work(request.cached, piece.begin) + share * work(piece.begin, end)
            left = work(request.cached, total) - done
            elapsed = now - request.started
            eta: float | None = None
            if request.done >= total:
                eta = 0.0
            elif done > 0:
                eta = elapsed * max(0.0, left) / done
            try:
                report(Progress(int(request.done), total, eta, elapsed, request.cached))
            except BaseException as error:
                request.fail(error)
        if all(piece.sequence.request.stopped for piece in pieces):
            raise Abandoned
