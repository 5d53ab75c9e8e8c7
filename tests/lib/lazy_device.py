"""A device on the CPU whose queues really run apart: one does its work at once, the others late.

With `ahead="computation"` what is computed is computed at the call, and a copy of another queue is
done as late as the order allows: when somebody waits for it. With `ahead="copies"` it is the other
way round: a copy runs as soon as the events that its queue waits for are done, but the computation
only when the host, or a copy, waits for it. So whoever forgets to wait meets old bytes, or destroys
bytes that are still needed, in one of the two.

To compute late, every op on the device's memory is put off: a result is memory of the right shape
that is filled later. What reads a number on the host waits, as it does on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lib.recording_device import GARBAGE, RecordingDevice
from qwen1m_ext.device import CopyQueue, Event, Graph

AHEAD: tuple[Literal["computation", "copies"], ...] = ("computation", "copies")

HOST_READS = (
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"
)  # fmt: skip
DATA_DEPENDENT = (
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::is_nonzero", "aten::unique",
)  # fmt: skip


class LazyEvent:
    """The work of a queue up to here."""

    def __init__(self, queue: Queue, end: int) -> None:
        self.queue, self.end = queue, end
        self.seconds: float | None = None  # when it was done

    @property
    def done(self) -> bool:
        return self.queue.done >= self.end

    def synchronize(self) -> None:
        self.queue.device.force(self)

    def elapsed_time(self, end_event: LazyEvent) -> float:
        assert self.seconds is not None and end_event.seconds is not None, "both timed, and done"
        return 1000 * (end_event.seconds - self.seconds)


class Queue:
    """Work in order: functions, and events that are waited for."""

    def __init__(self, device: LazyDevice, lazy: bool) -> None:
        self.device, self.lazy = device, lazy  # lazy: work is done when somebody waits for it
        self.work: list[Callable[[], None] | LazyEvent] = []
        self.done = 0

    def push(self, work: Callable[[], None] | LazyEvent) -> None:
        with self.device.order:
            self.work.append(work)
            self.device.advance()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            self.device.check_copy(target, source)
            self.push(lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]

    def wait(self, event: Event) -> None:
        assert isinstance(event, LazyEvent)
        self.push(event)

    def record(self, timed: bool = False) -> Event:
        with self.device.order:
            event = LazyEvent(self, len(self.work))
            if timed:

                def note() -> None:
                    event.seconds = time.perf_counter()

                event.end += 1
                self.push(note)
            return event

    def step(self, forced: bool) -> bool:
        """Do the next piece of work; False: there is none, or it waits and is not forced to."""
        if self.done == len(self.work):
            return False
        work = self.work[self.done]
        if isinstance(work, LazyEvent):
            if not work.done:
                if not forced:
                    return False
                self.device.force(work)
        else:
            with torch.inference_mode():  # what is written may be a tensor of it
                work()
        self.work[self.done] = _NOTHING  # lets go of its tensors
        self.done += 1
        return True


def _NOTHING() -> None: ...


class LazyDevice(RecordingDevice):
    """See above. Give an engine on it `cuda_graphs=False` or layers in host memory."""

    def __init__(self, ahead: Literal["computation", "copies"]) -> None:
        super().__init__()
        self.ahead = ahead
        self.order = threading.RLock()
        self.computation = Queue(self, lazy=ahead == "copies")
        self.queues: list[Queue] = []  # of copies
        self._active = threading.local()
        self.put_off = 0  # ops
        self.unlocked = 0  # of `page_lock`

    # --- a device -----------------------------------------------------------------------------

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._mark(torch.zeros(tuple(shape), dtype=torch.uint8).to(dtype))

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._check_scope()
        self.check_copy(target, source)
        if self.is_locked(target):
            target.fill_(GARBAGE)
        self._mark(target)
        self.computation.push(lambda: target.copy_(source))  # type: ignore[arg-type,return-value]

    def record(self, timed: bool = False) -> Event:
        self._check_scope()
        return self.computation.record(timed)

    def wait(self, event: Event) -> None:
        self._check_scope()
        self.computation.wait(event)

    def copy_queue(self) -> CopyQueue:
        self.queues.append(Queue(self, lazy=self.ahead == "computation"))
        return self.queues[-1]

    def page_lock(self, memory: Tensor) -> Callable[[], None]:
        storage = memory.untyped_storage().data_ptr()
        self._locked.add(storage)

        def unlock(_: Tensor = memory) -> None:
            self._locked.remove(storage)
            self.unlocked += 1

        return unlock

    def capture(self, work: Callable[[], None]) -> Graph:
        raise AssertionError("work beside copies is not captured")

    @contextmanager
    def scope(self) -> Iterator[object]:
        with super().scope():
            if self.ahead == "computation" or getattr(self._active, "yes", False):
                yield self
                return
            self._active.yes = True
            try:
                with _Late(self):
                    yield self
            finally:
                self._active.yes = False

    # --- order ------------------------------------------------------------------------------------

    def is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def check_copy(self, target: Tensor, source: Tensor) -> None:
        assert self.is_locked(target) != self.is_locked(source), "one side is page-locked memory"
        assert target.is_contiguous() and source.is_contiguous()

    def advance(self) -> None:
        """Do what is allowed of the queues that are not lazy."""
        with self.order, self._executing():
            queues = [self.computation, *self.queues]
            while any(queue.step(forced=not self.computation.lazy)
                      for queue in queues if not queue.lazy):  # fmt: skip
                pass

    def force(self, event: LazyEvent) -> None:
        """Do what comes before an event."""
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        with self.order, self._executing():
            while not event.done:
                event.queue.step(forced=True)
                if self.computation.lazy:
                    self.advance()

    def finish(self) -> None:
        """Do all of the computation."""
        self.force(LazyEvent(self.computation, len(self.computation.work)))

    @contextmanager
    def _executing(self) -> Iterator[None]:
        before = getattr(self._active, "executing", False)
        self._active.executing = True
        try:
            yield
        finally:
            self._active.executing = before

    # --- ops that are put off ---------------------------------------------------------------------

    def put_off_op(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Queue an op if it touches memory of the device; do it at once if it does not."""
        if not self.is_late(args, kwargs):
            return func(*args, **kwargs)
        schema = func._schema
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        viewed = [r.alias_info is not None and not r.alias_info.is_write for r in schema.returns]
        if any(viewed) or schema.name == "aten::detach":
            return func(*args, **kwargs)
        if schema.name in DATA_DEPENDENT:
            self.finish()
            with self._executing():
                return func(*args, **kwargs)
        self.put_off += 1
        if any(written):
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            changed = [given.get(a.name) for a, yes in zip(schema.arguments, written, strict=True)
                       if yes]  # fmt: skip
            for leaf in tree_leaves(changed):
                if isinstance(leaf, Tensor):
                    self._mark(leaf)
            self.computation.push(lambda: func(*args, **kwargs))
            if not schema.returns:
                return None
            return changed[0] if len(schema.returns) == 1 else tuple(changed)
        meta_args, meta_kwargs = tree_map(_meta, (args, kwargs))
        shapes = func(*meta_args, **meta_kwargs)

        def room(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return self._mark(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))

        with self._executing():
            results = tree_map(room, shapes)

        def fill() -> None:
            for result, value in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(result, Tensor):
                    result.copy_(value)

        self.computation.push(fill)
        return results

    def is_late(self, args: Any, kwargs: Any) -> bool:
        """Whether an op touches memory of the device, and nobody waits for it."""
        if getattr(self._active, "executing", False):
            return False
        return any(isinstance(t, Tensor) and self.is_marked(t) for t in tree_leaves((args, kwargs)))

    @staticmethod
    def is_marked(tensor: Tensor) -> bool:
        return getattr(tensor.untyped_storage(), "of_lazy_device", False)

    @staticmethod
    def _mark(tensor: Tensor) -> Tensor:
        tensor.untyped_storage().of_lazy_device = True  # type: ignore[attr-defined]
        return tensor


class _Late(TorchDispatchMode):
    """Within it, ops on a device's memory are put off."""

    def __init__(self, device: LazyDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.device.is_late(args, kwargs) and func._can_decompose():
            with self:  # a reshape, say: a view, or a copy
                return func.decompose(*args, **(kwargs or {}))
        return self.device.put_off_op(func, args, kwargs or {})


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


@contextmanager
def host_reads_wait(device: LazyDevice) -> Iterator[None]:
    """Within it, what reads memory of the device on the host waits for its computation first."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_READS:
            plain = getattr(Tensor, name)

            def waiting(self: Tensor, *args: Any, _plain: Any = plain, _name: str = name) -> Any:
                if not device.is_marked(self) or getattr(device._active, "executing", False):
                    return _plain(self, *args)
                device.finish()
                with device._executing():
                    return self.clone() if _name == "cpu" else _plain(self, *args)

            patch.setattr(Tensor, name, waiting)
        yield
