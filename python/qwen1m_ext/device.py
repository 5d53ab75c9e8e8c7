"""Where a model computes, as the engine sees it: tensors, a queue of work, and copies to and fro.

There is one way through the engine for all devices. `Device` itself is the CPU: a call's work is
done when it returns, and what is put there is the tensor itself. A `StreamDevice` works behind the
host's back, in order: what the host puts there crosses through page-locked buffers that were
allocated once, what it wants back arrives at an event, and a sequence of calls can be captured and
replayed. `CudaDevice` is the one that is meant; tests have another, which runs on the CPU and
checks the rules.

Bulk copies that go on beside the computation have queues of their own (`CopyQueue`), ordered
against it and each other by events alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import huge_pages
from .errors import MemoryBudgetError
from .memory import available_bytes, format_bytes

STAGES = 3
"""Steps whose copies may be on their way at once: the engine has two with the runner."""

_ALIGNMENT = 256


class Event(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Wait until all that was queued before it is done."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds until another event; both are timed, and done."""


class CopyQueue(Protocol):
    """Copies beside the computation, in order: each begins when the one before it is done."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies of (target, source): one on the device, one in page-locked memory.

        Both are contiguous.
        """

    def wait(self, event: Event) -> None:
        """What is queued from now on begins when an event of any queue is done."""

    def record(self, timed: bool = False) -> Event:
        """An event at the end of this queue."""


class Graph(Protocol):
    """Captured calls."""

    def replay(self) -> None:
        """Queue all of them again, on the same memory."""


class Device:
    """The CPU."""

    name = "cpu"
    where: torch.device | None = None
    """Of tensors; None: torch's default."""

    def available_bytes(self) -> int | None:
        """Memory that can still be taken; None: unknown."""
        return available_bytes()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a cache, with any content."""
        return huge_pages.empty(shape, dtype)

    def scope(self) -> AbstractContextManager[object]:
        """Around everything that queues work, on any thread."""
        return nullcontext()

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device, valid until the step ends."""
        return tensor


class StreamDevice(Device):
    """A device with a queue. Subclasses say how it is reached."""

    num_sms: int
    where: torch.device

    def __init__(self) -> None:
        self._stages: list[tuple[Tensor, Event | None]] = []
        self._staged = torch.empty(
            0, dtype=torch.uint8
        )  # on the device: order is kept by the queue
        self._used: int | None = None  # bytes of the step's stage; None: no step
        self._results: deque[Tensor] = deque()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a cache, with any content."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.where)

    # --- what a device is -------------------------------------------------------------------------

    def page_locked(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory that copies read or write while the host goes on."""
        raise NotImplementedError

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between the device and page-locked memory."""
        raise NotImplementedError

    def record(self, timed: bool = False) -> Event:
        """An event at the end of the queue."""
        raise NotImplementedError

    def wait(self, event: Event) -> None:
        """What is queued from now on begins when an event of another queue is done."""
        raise NotImplementedError

    def copy_queue(self) -> CopyQueue:
        """Another queue, for copies only."""
        raise NotImplementedError

    def page_lock(self, memory: Tensor) -> Callable[[], None]:
        """Page-lock memory of `huge_pages.mapped`, for copies to and fro.

        Returns:
            A function that undoes it when no copy is under way, and keeps the memory until then.

        Raises:
            MemoryBudgetError: the system does not allow so much.
        """
        raise NotImplementedError

    def capture(self, work: Callable[[], None]) -> Graph:
        """Keep what `work` queues. It must not wait, and its memory must stay."""
        raise NotImplementedError

    # --- host to device ---------------------------------------------------------------------------

    def reserve(self, stage_bytes: int, results: int) -> None:
        """Allocate what crosses: bytes of a step's inputs, and numbers of a step's results."""
        self._stages = [(self.page_locked(stage_bytes, torch.uint8), None) for _ in range(STAGES)]
        self._staged = torch.empty(stage_bytes, dtype=torch.uint8, device=self.where)
        for _ in range(STAGES + 1):
            self._results.append(self.page_locked(results, torch.int64))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the calls of `put` and `put_into` of a step."""
        stage, event = self._stages[0]
        if event is not None:  # its copies were read STAGES steps ago: seldom a wait
            event.synchronize()
        self._used = 0
        try:
            yield
        finally:
            self._used = None
            self._stages = [*self._stages[1:], (stage, self.record())]

    def put(self, tensor: Tensor) -> Tensor:
        """See `Device`. More than was reserved, or outside of a step: an ordinary, slower copy."""
        if self._used is None or self._used + tensor.nbytes > len(self._staged):
            return tensor.to(self.where)
        begin, self._used = self._used, self._used + tensor.nbytes
        self._used += -self._used % _ALIGNMENT
        target, source = (
            memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for memory in (self._staged, self._stages[0][0])
        )
        source.copy_(tensor)
        self.copy(target, source)
        return target

    def put_into(self, target: Tensor, tensor: Tensor) -> None:
        """Overwrite memory of the device with a tensor of the host."""
        target.copy_(self.put(tensor))

    # --- device to host ---------------------------------------------------------------------------

    def fetch(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Queue the copy of [n] int64 to the host.

        Returns:
            A function that waits for it, to be called once, on any thread.
        """
        buffer = self._results.popleft()
        target = buffer[: len(tensor)]
        self.copy(target, tensor)
        event = self.record()

        def wait() -> list[int]:
            event.synchronize()
            numbers: list[int] = target.tolist()
            self._results.append(buffer)
            return numbers

        return wait


class CudaDevice(StreamDevice):
    """A CUDA device, with a stream of its own."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.where = torch.device("cuda", index)
        self.name = "cuda"
        self.num_sms = torch.cuda.get_device_properties(index).multi_processor_count
        self._stream = torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]
        self._pool: Any = None  # of the graphs: they run one after the other and share memory

    def available_bytes(self) -> int | None:
        """See `Device`: of the card, whoever uses it."""
        return int(torch.cuda.mem_get_info(self.where)[0])

    def scope(self) -> AbstractContextManager[object]:
        """See `Device`."""
        return torch.cuda.stream(self._stream)

    def page_locked(self, count: int, dtype: torch.dtype) -> Tensor:
        """See `StreamDevice`."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `StreamDevice`."""
        target.copy_(source, non_blocking=True)

    def record(self, timed: bool = False) -> Event:
        """See `StreamDevice`."""
        return _record(self._stream, timed)

    def wait(self, event: Event) -> None:
        """See `StreamDevice`."""
        self._stream.wait_event(cast(Any, event))

    def copy_queue(self) -> CopyQueue:
        """See `StreamDevice`."""
        return _CudaCopies(self.where)

    def page_lock(self, memory: Tensor) -> Callable[[], None]:
        """See `StreamDevice`: by registration, as torch's own allocator takes powers of two."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error):
            raise MemoryBudgetError(
                f"host memory: {memory.nbytes} bytes ({format_bytes(memory.nbytes)}) could not be "
                f"page-locked: {runtime.cudaGetErrorString(error)}"
            )

        def unlock() -> None:
            with suppress(RuntimeError):  # of a kernel that has failed: no copy goes on then
                torch.cuda.synchronize(self.where)
            runtime.cudaHostUnregister(memory.data_ptr())

        return unlock

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `StreamDevice`."""
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        self._pool = self._pool or graph.pool()
        return graph


class _CudaCopies:
    """A `CopyQueue`: a stream."""

    def __init__(self, where: torch.device) -> None:
        self._stream = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        self._stream.wait_event(cast(Any, event))

    def record(self, timed: bool = False) -> Event:
        return _record(self._stream, timed)


def _record(stream: Any, timed: bool) -> Event:
    # who waits sleeps
    event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


CPU = Device()
