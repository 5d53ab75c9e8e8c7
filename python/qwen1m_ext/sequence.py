"""A request inside the engine: its samples, what of them is computed, and where they stand.

Who writes what: the scheduler everything but `tokens` (the runner appends what it samples) and
`metrics` (the output processor counts, the runner times the prefill). The flags that stop a
request (`stop`, `fail`) may be set by any thread and are never taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .cost_model import Work
from .events import OnProgress
from .handle import RequestHandle
from .kv_cache import SequenceCache
from .ops import PAGE_SIZE
from .request import RequestMetrics, SamplingParams
from .sampler import Sampler
from .sessions import Session
from .sparsity import SparsePrefill
from .speculative import NgramSpeculator

OnHidden = Callable[[int, Tensor], None]
"""Called with (position of the first row, final hidden states [n, hidden]) for every prompt row."""


@dataclass(frozen=True)
class AttentionPolicy:
    """How a request's prompt attends, and so where its chunks may end.

    A dense prefill may stop anywhere. A sparse one selects keys per segment, so it stops only at
    segment ends: multiples of `grid` tokens and the borders of the Dual Chunk chunks.
    """

    name: str = "dense"  # part of the prefix cache's root
    grid: int = 1
    border: int | None = None  # chunk_len of Dual Chunk Attention

    @property
    def sparse(self) -> bool:
        """Whether the cost model's sparse coefficients apply."""
        return self.grid > 1

    def last_stop(self, tokens: int) -> int:
        """The last position of at most `tokens` where a chunk may end."""
        stop = tokens - tokens % self.grid
        return max(stop, tokens - tokens % self.border) if self.border else stop

    def last_page_stop(self, pages: int) -> int:
        """Of at most so many pages: how many end where a chunk may end."""
        while pages and self.last_stop(pages * PAGE_SIZE) < pages * PAGE_SIZE:
            pages = self.last_stop(pages * PAGE_SIZE) // PAGE_SIZE
        return pages

    def chunk_end(self, begin: int, wanted: int, total: int) -> int:
        """Where a chunk from `begin` on ends: at or before `wanted`, or at the first stop."""
        if wanted >= total:
            return total
        stop = self.last_stop(wanted)
        if stop > begin:
            return stop
        after = begin - begin % self.grid + self.grid
        if self.border:
            after = min(after, begin - begin % self.border + self.border)
        return min(after, total)


DENSE = AttentionPolicy()


class Request:
    """One prompt and its `n` samples."""

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        priority: int = 0,
        temperature: float = 1.0,
        session: Session | None = None,
        policy: AttentionPolicy = DENSE,
        sparse: SparsePrefill | None = None,
        on_hidden: OnHidden | None = None,
        pin: bool = False,
    ) -> None:
        """`arrival` counts submissions; `temperature` is s(n) of this prompt alone."""
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.arrival, self.priority = arrival, priority
        self.temperature, self.session, self.policy = temperature, session, policy
        self.sparse, self.on_hidden, self.pin = sparse, on_hidden, pin
        self.keys: list[bytes] = []  # of the prompt's full pages under `root`
        self.root = b""
        self.samples: list[Sequence] = []
        self.prefilled = False
        self.stopped = False  # cancelled or failed: nothing of it runs any more
        self.error: BaseException | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.cached = 0
        self.scored = 0  # prompt rows that `on_hidden` has seen
        self.done = 0.0  # prompt tokens, finished layers of the current chunk included
        self.metrics = RequestMetrics(prompt_tokens=len(prompt), sparse=sparse is not None)
        self.handle: RequestHandle | None = None
        self.on_progress: OnProgress | None = None

    @property
    def frozen(self) -> bool:
        """Whether all its tokens, output included, are computed under one temperature."""
        return self.session is not None and self.session.freeze_temperature

    @property
    def leader(self) -> Sequence:
        """The sample that prefills the prompt; the others begin with its pages."""
        return self.samples[-1]

    def stop(self) -> None:
        """Let nothing of it run any more."""
        self.stopped = True

    def fail(self, error: BaseException) -> None:
        """The same, for a reason that the caller will see."""
        if self.error is None:
            self.error = error
        self.stopped = True


@dataclass(eq=False)
class Sequence:
    """One sample: prompt, output, cache."""

    request: Request
    index: int
    max_tokens: int  # of output
    sampler: Sampler | None = None  # None: in tests of the scheduler
    speculator: NgramSpeculator | None = None  # the runner's
    tokens: list[int] = field(default_factory=list)  # prompt, then output
    cache: SequenceCache | None = None  # None: waiting
    total: int = 0  # tokens, those included that a step in flight will sample
    computed: int = 0  # tokens whose keys and values are there
    temperature: float = 1.0  # under which its pages are computed
    root: bytes = b""
    keys: list[bytes] = field(default_factory=list)
    offered: int = 0  # pages that others can find
    in_flight: int = 0  # steps
    last_step: int = 0
    final_outputs: int | None = None  # known to be enough: stop
    preempting: bool = False
    released: bool = False
    preemptions: int = 0

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.tokens = list(self.request.prompt)
        self.total = len(self.tokens)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens in the cache or on their way there."""
        return self.cache.length if self.cache else 0

    @property
    def key(self) -> tuple[int, int, int]:
        """Order of service."""
        return self.request.priority, self.request.arrival, self.index

    @property
    def is_leader(self) -> bool:
        """Whether it prefills the prompt for the others."""
        return self is self.request.leader

    @property
    def planned_outputs(self) -> int:
        """Output tokens, those of steps in flight included."""
        return self.total - self.prompt_len

    @property
    def decoding(self) -> bool:
        """Whether its next piece is one new token."""
        return self.planned_outputs > 0 and self.total - self.length == 1

    @property
    def complete(self) -> bool:
        """Whether nothing more is planned: its end is only not known yet."""
        return self.planned_outputs >= self.max_tokens

    @property
    def stopping(self) -> bool:
        """Whether it only waits for its steps in flight."""
        return self.request.stopped or self.final_outputs is not None or self.preempting


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of a sequence in a step."""

    sequence: Sequence
    begin: int
    end: int
    sample: bool  # whether the last token's logits give the next one

    @property
    def decode(self) -> bool:
        """Whether it is one token of the output."""
        return self.end - self.begin == 1 and self.begin >= self.sequence.prompt_len

    @property
    def sampled_on_device(self) -> bool:
        """Whether the token after it need not come to the host, if logits are on a device."""
        sampler = self.sequence.sampler
        return self.sample and sampler is not None and sampler.on_device

    @property
    def decodes_on_device(self) -> bool:
        """Whether it goes there from token to token."""
        return self.decode and self.sampled_on_device

    @property
    def is_scored(self) -> bool:
        """Whether somebody wants the hidden states of all its rows."""
        wanted = self.sequence.request.on_hidden is not None and self.sequence.is_leader
        return wanted and self.begin < self.sequence.prompt_len

    @property
    def work(self) -> Work:
        """For the cost model."""
        sparse = self.sequence.request.policy.sparse
        return Work(self.begin, self.end, self.decode, sparse and not self.decode)


@dataclass(frozen=True)
class Step:
    """What goes through the model at once; decodes first."""

    number: int
    pieces: list[Piece]
