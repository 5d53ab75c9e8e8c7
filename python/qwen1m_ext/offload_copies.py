"""How pages of an offloaded cache get from their homes in host memory to a slot, and back.

Two ways, for the two kinds of device (`device.py`). Where a call has done its work when it returns,
a thread copies (`ThreadCopies`). Where work is queued, two copy queues do, one for each direction,
since a card moves data in and out at the same time (`QueueCopies`); events order them:

    a load waits for the store of what was in its slot, and so for all stores before it;
    the computation on a layer waits for the layer's load;
    a store waits for the computation that has been queued when its layer is released;
    the computation after a step waits for the step's stores.

The host waits for none of them. So the last line makes the homes the truth for all that comes
later in the computation's queue, and for a host that has waited for that. A load of the next step
does not wait for it: its slot is free earlier, and it comes while the last layers compute.

Pages are copied in runs of neighbours, K and V each with one call. The allocator hands out
neighbours as long as there are some. To start a copy takes microseconds, so a queue's load takes a
small gap between two runs along (`BRIDGE_BYTES`): what comes into a slot that way is read by
nobody. A store never does, since what is in a slot beside its runs is not the truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .device import CopyQueue, Event, StreamDevice
from .errors import BackendError

Runs = list[tuple[int, int]]
"""Pages as [begin, end) of neighbours, ascending."""

Pair = tuple[Tensor, Tensor]
"""K and V of a layer: [pages, kv_heads, 128, head_dim] each."""

BRIDGE_BYTES = 256 << 10
"""The largest gap of K, or of V, that a load takes along: 5 us at 50 GB/s, about what it takes to
start another copy from Python (an estimate, not measured)."""

Kind = Literal["load", "store", "wait"]


@dataclass(frozen=True)
class Transfer:
    """What happened to a layer's pages, for traces: seconds of `time.perf_counter`."""

    kind: Kind  # wait: of the computation, for a load or a store
    layer: int
    begin: float
    end: float
    num_bytes: int = 0


def joined(runs: Runs, gap: int = 0) -> Runs:
    """Neighbouring runs as one, with the pages of gaps up to `gap` between them."""
    result: Runs = []
    for begin, end in runs:
        if result and begin - result[-1][1] <= gap:
            result[-1] = result[-1][0], end
        else:
            result.append((begin, end))
    return result


class Copies(Protocol):
    """Copies of one cache, a step at a time."""

    trace: list[Transfer] | None
    """If there is one, what happens is added to it, by the end of the next `settle`."""

    def load(self, layer: int, home: Pair, slot: Pair, runs: Runs) -> None:
        """Bring a layer's pages into a slot, as soon as what was in it has left."""

    def arrive(self, layer: int) -> None:
        """The computation goes on when the layer's load is done."""

    def store(self, layer: int, slot: Pair, home: Pair, runs: Runs) -> None:
        """Take pages home that the computation so far has written."""

    def finish(self) -> None:
        """End a step: the homes are the truth for the computation after it."""

    def give_up(self) -> None:
        """End a step that was left in the middle: no copy of it meets what comes after it."""

    def copy_page(self, homes: Sequence[Tensor], source: int, target: int) -> None:
        """Copy a page of every home, after the steps so far and before those to come."""

    def settle(self) -> None:
        """Let the host wait for all of it: it may read and write the homes now."""


class ThreadCopies:
    """`Copies` on a thread; the computation waits for it."""

    def __init__(self) -> None:
        self.trace: list[Transfer] | None = None
        # one worker: a slot's store is done before its next load, and a load sees earlier stores
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kv-offload")
        self._loads: dict[int, Future[None]] = {}
        self._stores: list[tuple[int, Future[None]]] = []

    def load(self, layer: int, home: Pair, slot: Pair, runs: Runs) -> None:
        """See `Copies`."""
        self._loads[layer] = self._worker.submit(self._copy, "load", layer, home, slot, runs)

    def arrive(self, layer: int) -> None:
        """See `Copies`. Raises BackendError if the copy failed."""
        self._finish("load", layer, self._loads[layer])

    def store(self, layer: int, slot: Pair, home: Pair, runs: Runs) -> None:
        """See `Copies`."""
        del self._loads[layer]
        store = self._worker.submit(self._copy, "store", layer, slot, home, runs)
        self._stores.append((layer, store))

    def finish(self) -> None:
        """See `Copies`. Raises BackendError if a copy failed."""
        for layer, store in self._stores:
            self._finish("store", layer, store)
        self._stores.clear()

    def give_up(self) -> None:
        """See `Copies`."""
        copies = [*self._loads.values(), *(store for _, store in self._stores)]
        for copy in copies:
            copy.cancel()
        wait(copies)
        self._loads.clear()
        self._stores.clear()

    def copy_page(self, homes: Sequence[Tensor], source: int, target: int) -> None:
        """See `Copies`."""
        for home in homes:
            home[target] = home[source]

    def settle(self) -> None:
        """See `Copies`: a step has waited already."""

    def _finish(self, kind: Kind, layer: int, copy: Future[None]) -> None:
        begin, waited = time.perf_counter(), not copy.done()
        try:
            copy.result()
        except Exception as error:
            raise BackendError(
                f"kv offload: the {kind} of layer {layer} failed: {error}"
            ) from error
        if waited:
            self._note("wait", layer, begin)

    def _copy(self, kind: Kind, layer: int, source: Pair, target: Pair, runs: Runs) -> None:
        """On the thread. NumPy copies on one core and leaves torch's threads to the layers."""
        begin, size = time.perf_counter(), 0
        for old, new in zip(source, target, strict=True):
            from_bytes, to_bytes = (t.view(torch.uint8).numpy() for t in (old, new))
            for first, end in runs:
                np.copyto(to_bytes[first:end], from_bytes[first:end])
                size += to_bytes[first:end].nbytes
        self._note(kind, layer, begin, size)

    def _note(self, kind: Kind, layer: int, begin: float, size: int = 0) -> None:
        if self.trace is not None:
            self.trace.append(Transfer(kind, layer, begin, time.perf_counter(), size))


class QueueCopies:
    """`Copies` on two queues of a device. Errors of a copy are those of the device."""

    def __init__(self, device: StreamDevice, bounce: Tensor) -> None:
        """`bounce`: [homes, kv_heads, 128, head_dim] on the device, a page of each on its way."""
        self.trace: list[Transfer] | None = None
        self._device, self._bounce = device, bounce
        self._in, self._out = device.copy_queue(), device.copy_queue()
        # by address of a slot: when what was in it is home
        self._free: dict[int, Event | None] = {}
        self._loads: dict[int, Event] = {}  # nobody has waited for them yet
        self._last = 0  # layer that was stored
        self._page_lock = threading.Lock()  # of the bounce
        self._start: tuple[Event, float] | None = None  # of the trace; seconds of the host
        self._timed: list[tuple[Kind, int, Event, Event, int]] = []

    def load(self, layer: int, home: Pair, slot: Pair, runs: Runs) -> None:
        """See `Copies`."""
        if free := self._free.setdefault(slot[0].data_ptr(), None):
            self._in.wait(free)
        runs = joined(runs, BRIDGE_BYTES // home[0][0].nbytes)
        self._loads[layer] = self._move(self._in, "load", layer, home, slot, runs)

    def arrive(self, layer: int) -> None:
        """See `Copies`."""
        if load := self._loads.pop(layer, None):
            self._await(load, layer)

    def store(self, layer: int, slot: Pair, home: Pair, runs: Runs) -> None:
        """See `Copies`."""
        self._out.wait(self._device.record())
        stored = self._move(self._out, "store", layer, slot, home, runs)
        self._free[slot[0].data_ptr()] = stored
        self._last = layer

    def finish(self) -> None:
        """See `Copies`."""
        self._await(self._out.record(), self._last)

    def give_up(self) -> None:
        """See `Copies`."""
        self.finish()
        self._loads.clear()
        ended = self._device.record()  # the computation may be using any slot until then
        self._free = dict.fromkeys(self._free, ended)

    def copy_page(self, homes: Sequence[Tensor], source: int, target: int) -> None:
        """See `Copies`. The page passes through the device: its queues know the order."""
        with self._page_lock:
            self._in.wait(self._out.record())
            self._in.copy(zip(self._bounce, (home[source] for home in homes), strict=True))
            self._out.wait(self._in.record())
            self._out.copy(zip((home[target] for home in homes), self._bounce, strict=True))
            self._in.wait(self._out.record())
            self.finish()

    def settle(self) -> None:
        """See `Copies`."""
        self._device.record().synchronize()
        if self._timed:  # those of a step that was given up may still be under way
            self._in.record().synchronize()
        if self._start is not None and self.trace is not None:
            zero, seconds = self._start
            for kind, layer, begin, end, size in self._timed:
                first, last = (seconds + zero.elapsed_time(e) / 1000 for e in (begin, end))
                self.trace.append(Transfer(kind, layer, first, last, size))
        self._timed.clear()

    def _await(self, event: Event, layer: int) -> None:
        """The computation waits."""
        begin = self._device.record(timed=True) if self.trace is not None else None
        self._device.wait(event)
        if begin:
            self._timed.append(("wait", layer, begin, self._device.record(timed=True), 0))

    def _move(
        self, queue: CopyQueue, kind: Kind, layer: int, source: Pair, target: Pair, runs: Runs
    ) -> Event:
        timed = self.trace is not None
        if timed and self._start is None:
            zero = queue.record(timed)
            zero.synchronize()  # once, for a trace
            self._start = zero, time.perf_counter()
        begin = queue.record(timed) if timed else None
        pairs = [
            (new[first:end], old[first:end])
            for old, new in zip(source, target, strict=True)
            for first, end in runs
        ]
        queue.copy(pairs)
        done = queue.record(timed)
        if begin:
            size = sum(new.nbytes for new, _ in pairs)
            self._timed.append((kind, layer, begin, done, size))
        return done
