"""The engine's three threads: scheduler, model runner, output processor.

They talk through queues and never wait for one another's answers. The scheduler keeps up to two
steps with the runner: one that runs and one that is planned. The runner hands its tokens to the
output processor and goes on with the next step at once; the scheduler hears of both later.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import BackendError, RequestError
from .events import EngineStats, RequestStatus, State
from .heartbeat import Observer, Pulse
from .output_processor import OutputProcessor
from .runner import ModelRunner
from .scheduler import Scheduler
from .sequence import Request, Sequence, Step
from .step_result import StepResult

STEPS_AHEAD = 2
"""Steps with the runner: one runs, one waits for it."""

LEAD_SECONDS = 0.05
"""The next step is planned so long before the current one is expected to end: early enough that the
runner does not wait, late enough that who arrives during a long step is in the next one."""

Command = Callable[[], None]


@dataclass
class Span:
    """What a thread did, for traces: seconds of `time.perf_counter`."""

    thread: str
    begin: float
    end: float
    step: int = 0


class Core:
    """Owns the threads; they start with the first request."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        make_outputs: Callable[[Callable[[Sequence, int], None]], OutputProcessor],
    ) -> None:
        """`make_outputs(on_finish)` makes the output processor."""
        self.scheduler, self.runner = scheduler, runner
        self.outputs = make_outputs(self._on_finish)
        self.requests: dict[str, Request] = {}  # not yet released
        self.trace: list[Span] | None = None
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._steps: queue.SimpleQueue[tuple[Step, float] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._in_flight: deque[float] = deque()  # predicted seconds of the runner's steps
        self._expected_end = 0.0  # of all of them
        self._prompt_tokens = self._cached_tokens = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self.failure: BaseException | None = None
        self._idle = threading.Condition(self._lock)
        self._pulses = {
            "scheduler": Pulse(), "model runner": runner.pulse, "output processor": Pulse()
        }  # fmt: skip

    # --- from any thread --------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; its handle is set."""
        with self._lock:
            if self._closing:
                raise BackendError("engine: expected a running one, got one that is shut down")
            if self.failure is not None:
                raise BackendError(f"engine: stopped by an error: {self.failure!r}")
            if request.request_id in self.requests:
                raise RequestError(f"request_id: expected a new one, got {request.request_id!r}")
            self.requests[request.request_id] = request
            if not self._threads:
                self._start()
        self._inbox.put(lambda: self.scheduler.add(request))

    def cancel(self, request: Request) -> None:
        """Stop a request within one chunk."""
        request.stop()
        self._inbox.put(lambda: self.scheduler.residency.cancel(request))

    def call(self, command: Command) -> None:
        """Run something on the scheduler's thread."""
        self._inbox.put(command)

    def post(self, command: Command) -> None:
        """Run something on the output processor's thread, in order with the tokens."""
        self._results.put(command)

    def observer(self, timeout: float) -> Observer:
        """Tells whether one of the threads is stuck."""
        return Observer(self._pulses, lambda: bool(self.requests), timeout)

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        residency, outputs = self.scheduler.residency, self.outputs
        allocator = residency.cache.allocator
        return EngineStats(
            requests_waiting=len({s.request.request_id for s in tuple(residency.waiting)}),
            requests_running=len({s.request.request_id for s in tuple(residency.running)}),
            pages_total=allocator.num_pages,
            pages_used=allocator.num_pages - allocator.num_free,
            pages_cached=allocator.num_idle,
            pages_pinned=residency.prefixes.num_pinned,
            preemptions_total=residency.preemptions,
            evictions_total=allocator.evictions,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            output_tokens_total=outputs.output_tokens,
            discarded_tokens_total=residency.discarded,
            steps_total=self.scheduler.steps,
            requests_finished=dict(outputs.finished),
        )

    def status(self, request: Request) -> RequestStatus:
        """A request at this moment."""
        mine = (request.priority, request.arrival)
        ahead = 0.0
        if request.started is None:
            others = tuple(self.requests.values())
            ahead = sum(self._left(r) for r in others if (r.priority, r.arrival) < mine)
        return self._status(request, ahead)

    def statuses(self) -> dict[str, RequestStatus]:
        """Every request that is not released, by id, at this moment."""
        ahead, result = 0.0, {}
        in_order = sorted(tuple(self.requests.values()), key=lambda r: (r.priority, r.arrival))
        for request in in_order:
            result[request.request_id] = self._status(request, ahead)
            ahead += self._left(request)
        return result

    def _left(self, request: Request) -> float:
        """Predicted seconds of the rest of its prefill."""
        if request.prefilled:
            return 0.0
        work = self.scheduler.cost.prefill_seconds
        return work(int(request.done), len(request.prompt), request.policy.sparse)

    def _status(self, request: Request, ahead: float) -> RequestStatus:
        """`ahead`: predicted seconds of the prefills in front of it."""
        total = len(request.prompt)
        done = min(total, int(request.done))
        outputs = request.metrics.output_tokens
        work = self.scheduler.cost.prefill_seconds
        sparse = request.policy.sparse
        eta: float | None = None
        if request.request_id not in self.requests:
            state: State = "finished"
        elif request.prefilled or outputs:
            state, eta = "decode", 0.0
        elif request.started is not None:
            state = "prefill"
            finished = work(request.cached, done, sparse)
            if finished > 0:
                elapsed = time.perf_counter() - request.started
                eta = elapsed * work(done, total, sparse) / finished
            else:
                eta = work(done, total, sparse)
        else:
            state, eta = "queued", ahead + work(0, total, sparse)
        return RequestStatus(request.request_id, state, done, total, request.cached, eta, outputs)

    def shutdown(self, drain: bool) -> None:
        """End the threads, after all requests are done (`drain`) or cancelled; idempotent."""
        with self._lock:
            self._closing = True
            threads, requests = list(self._threads), list(self.requests.values())
        if threads and threading.current_thread() not in threads:
            if not drain:
                for request in requests:
                    self.cancel(request)
            with self._idle:
                self._idle.wait_for(lambda: not self.requests or self.failure is not None)
        self._inbox.put(None)
        if threading.current_thread() not in threads:
            for thread in threads:
                thread.join()

    # --- the threads ------------------------------------------------------------------------------

    def _start(self) -> None:
        for name, loop in (
            ("scheduler", self._schedule),
            ("runner", self._run),
            ("outputs", self._process),
        ):
            thread = threading.Thread(target=self._guard, args=(loop,), name=f"qwen1m {name}")
            thread.daemon = True
            self._threads.append(thread)
            thread.start()

    def _guard(self, loop: Callable[[], None]) -> None:
        """A bug must not leave callers waiting: they get the error."""
        try:
            loop()
        except BaseException as error:
            self.failure = error
            for thread_queue in (self._inbox, self._steps, self._results):
                thread_queue.put(None)  # the others end too
            for request in tuple(self.requests.values()):
                request.fail(error)
                self._release(request)
            raise

    def _schedule(self) -> None:
        wait: float | None = None
        pulse = self._pulses["scheduler"]
        while True:
            pulse.end()
            try:
                command = self._inbox.get(timeout=wait)
            except queue.Empty:
                command = _nothing  # time to plan the next step
            begin = time.perf_counter()
            pulse.begin()
            while command is not None:
                command()
                pulse.beat()
                try:
                    command = self._inbox.get_nowait()
                except queue.Empty:
                    break
            if command is None:
                pulse.end()
                break
            wait = self._plan()
            while self._take_released():  # there may be room for somebody who waits
                wait = self._plan()
            self._note("scheduler", begin, self.scheduler.steps)
        self._steps.put(None)
        self._results.put(None)

    def _plan(self) -> float | None:
        """Keep the runner supplied; returns when to look again, in seconds; None: with news."""
        while len(self._in_flight) < STEPS_AHEAD:
            wait = self._expected_end - LEAD_SECONDS - time.perf_counter()
            if self._in_flight and wait > 0:
                return wait
            step = self.scheduler.plan()
            if step is None:
                return None
            seconds = self.scheduler.cost.seconds(piece.work for piece in step.pieces)
            begin = self._expected_end if self._in_flight else time.perf_counter()
            self._expected_end = begin + seconds
            self._in_flight.append(seconds)
            self._steps.put((step, seconds))
        return None

    def _run(self) -> None:
        pulse = self.runner.pulse
        while (planned := self._steps.get()) is not None:
            step, seconds = planned
            begin = time.perf_counter()
            pulse.begin(seconds)
            result = self.runner.run(step)
            if result.finish is not None:  # it is under way on a device
                self._results.put(lambda r=result, s=seconds: self._finish(r, s))  # type: ignore[misc]
            else:
                if result.sampled:
                    self._results.put(lambda r=result: self._push(r))  # type: ignore[misc]
                self._inbox.put(lambda r=result: self._retire(r))  # type: ignore[misc]
            self._note("runner", begin, step.number)
            pulse.end()

    def _process(self) -> None:
        pulse = self._pulses["output processor"]
        while (command := self._results.get()) is not None:
            begin = time.perf_counter()
            pulse.begin()
            command()
            self._note("outputs", begin, 0)
            pulse.end()

    # --- on the scheduler's thread ----------------------------------------------------------------

    def _retire(self, result: StepResult) -> None:
        self._in_flight.popleft()
        self._expected_end = time.perf_counter() + sum(self._in_flight)
        self.scheduler.retire(result.step, result.done, result.seconds)
        for request in {piece.sequence.request for piece in result.step.pieces}:
            if request.stopped:
                self.scheduler.residency.cancel(request)

    def _take_released(self) -> bool:
        residency = self.scheduler.residency
        taken, residency.released = residency.released, []
        for request in dict.fromkeys(sequence.request for sequence in taken):
            if all(s.released for s in request.samples):
                self._prompt_tokens += len(request.prompt)
                self._cached_tokens += request.cached
                self._results.put(lambda r=request: self._release(r))  # type: ignore[misc]
        return bool(taken)

    # --- on the output processor's thread ---------------------------------------------------------

    def _finish(self, result: StepResult, seconds: float) -> None:
        """Wait for a step that is to take so long; the next one is with the device meanwhile."""
        assert result.finish is not None
        self._pulses["output processor"].begin(seconds)
        result.finish()
        self._pulses["output processor"].begin()
        self._inbox.put(lambda: self._retire(result))
        self._push(result)

    def _push(self, result: StepResult) -> None:
        for sequence, token, candidates in result.sampled:
            self.outputs.push(sequence, token, candidates)
            if sequence.request.stopped:  # a callback raised
                self.cancel(sequence.request)

    def _on_finish(self, sequence: Sequence, outputs: int) -> None:
        self._inbox.put(lambda: self.scheduler.residency.finish(sequence, outputs))

    def _release(self, request: Request) -> None:
        with self._idle:
            self.requests.pop(request.request_id, None)
            self._idle.notify_all()
        self.outputs.released(request)

    def _note(self, thread: str, begin: float, step: int) -> None:
        if self.trace is not None:
            self.trace.append(Span(thread, begin, time.perf_counter(), step))


def _nothing() -> None:
    pass
