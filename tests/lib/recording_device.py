"""A device with a queue that is the CPU: the engine's way to a GPU, run and checked without one.

Work is done at once, but the host is not to know: results it asked for are garbage until their
event was waited for, page-locked memory must stay as it is until then, and what is captured is
recorded op by op, held against the rules (no allocation, nothing read by the host) and replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lib.capture import Recorder, recorded
from lib.emulator import EMULATED_SMS
from qwen1m_ext.device import Event, Graph, StreamDevice

GARBAGE = -0x7777_7777
"""What page-locked memory holds before a copy to it is known to be done."""


class _Copy:
    """A copy between the device and page-locked memory, which is not to be touched meanwhile."""

    def __init__(self, target: Tensor, source: Tensor, to_host: bool) -> None:
        self.target, self.values, self.to_host = target, source.clone(), to_host
        self.locked = target if to_host else source
        if to_host:
            target.fill_(GARBAGE)
        else:
            target.copy_(source)
        self.seen = self.locked.clone()

    def finish(self) -> None:
        assert torch.equal(
            self.locked.reshape(-1).view(torch.uint8), self.seen.reshape(-1).view(torch.uint8)
        ), "page-locked memory was changed before its copy was known to be done"
        if self.to_host:
            self.target.copy_(self.values)


class _Event:
    def __init__(self, device: RecordingDevice, end: int) -> None:
        self._device, self._end = device, end  # copies before it

    def synchronize(self) -> None:
        self._device.finish_copies(self._end)


class _Replay:
    """The ops of a capture, done again on the same memory."""

    def __init__(self, recorder: Recorder) -> None:
        self._tape = recorder.tape
        self._addresses = self._now()
        self.replays = 0

    def _now(self) -> list[int]:
        leaves = tree_leaves([(args, kwargs) for _, args, kwargs in self._tape])
        return [leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        assert self._now() == self._addresses, "captured memory has moved"
        self.replays += 1
        for func, args, kwargs in self._tape:
            func(*args, **kwargs)


class RecordingDevice(StreamDevice):
    """See above."""

    name = "cuda"
    num_sms = EMULATED_SMS
    where = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[_Replay] = []
        self._copies: list[_Copy] = []
        self._done = 0  # of all copies so far
        self.broken = False  # a kernel has failed
        self.spilled = 0  # inputs of a step that found no room in what was reserved
        self._lock = threading.Lock()
        self._locked: set[int] = set()  # storages
        self._in_scope = threading.local()

    def available_bytes(self) -> int | None:
        return 8 << 30

    @contextmanager
    def scope(self) -> Iterator[object]:
        before = getattr(self._in_scope, "yes", False)
        self._in_scope.yes = True
        try:
            yield self
        finally:
            self._in_scope.yes = before

    def page_locked(self, count: int, dtype: torch.dtype) -> Tensor:
        memory = torch.empty(count, dtype=dtype)
        self._locked.add(memory.untyped_storage().data_ptr())
        return memory

    def put(self, tensor: Tensor) -> Tensor:
        if self._used is not None and self._used + tensor.nbytes > len(self._staged):
            self.spilled += 1
        return super().put(tensor)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._check_scope()
        locked = [t.untyped_storage().data_ptr() in self._locked for t in (target, source)]
        assert sum(locked) == 1, "expected one side in page-locked memory"
        with self._lock:
            self._copies.append(_Copy(target, source, to_host=locked[0]))

    def record(self, timed: bool = False) -> Event:
        self._check_scope()
        with self._lock:
            return _Event(self, self._done + len(self._copies))

    def finish_copies(self, end: int) -> None:
        """The host knows that so many copies are done."""
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        with self._lock:
            while self._done < end:
                self._copies.pop(0).finish()
                self._done += 1

    def capture(self, work: Callable[[], None]) -> Graph:
        self._check_scope()
        with recorded() as recorder:
            work()
        assert recorder.problems == [], f"cannot be captured: {recorder.problems}"
        self.graphs.append(_Replay(recorder))
        return self.graphs[-1]

    def _check_scope(self) -> None:
        assert getattr(self._in_scope, "yes", False), "work was queued outside of the scope"
