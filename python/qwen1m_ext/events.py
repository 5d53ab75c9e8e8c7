"""What a running request tells: progress of its prefill, new tokens, its state, the engine's state.

Events of one request arrive in order: `Progress` (any number; after a preemption also between
tokens), `PromptScored` if asked for, `OutputDelta`s, each sample's last one with its
`finish_reason`, then `Finished` exactly once. They are immutable and may cross threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .request import FinishReason, RequestMetrics, TokenLogprobs

State = Literal["queued", "prefill", "decode", "finished"]


@dataclass(frozen=True)
class Progress:
    """How far a prefill is. `eta` is None until something has been measured."""

    done: int  # tokens, a chunk's finished layers counted as their share of its tokens
    total: int  # tokens of the prompt
    eta: float | None  # seconds to the end of the prefill
    elapsed: float  # seconds since its start
    cached: int = 0  # of `done`: taken from a cache


@dataclass(frozen=True)
class PromptScored:
    """The `prompt_logprobs` of a request, complete; None for the first token."""

    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class OutputDelta:
    """What one sample has gained since its last delta; `text` can be empty (half a character)."""

    index: int  # of the sample, 0 to n - 1
    token_ids: list[int]
    text: str
    metrics: RequestMetrics  # of the request so far
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Finished:
    """The end of a request, all samples included; nothing follows."""

    metrics: RequestMetrics
    error: BaseException | None = None  # what made it fail; None: complete or cancelled
    cancelled: bool = False


Event = Progress | PromptScored | OutputDelta | Finished

OnEvent = Callable[[Event], None]
"""Called on the engine's threads, in order; must not block. Raising fails the request with that
exception."""

OnProgress = Callable[[Progress], None]
"""Called after every layer of every chunk. May raise: the prefill stops there."""


@dataclass(frozen=True)
class RequestStatus:
    """A request at this moment."""

    request_id: str
    state: State
    done: int  # prompt tokens in the cache
    total: int  # prompt tokens
    cached: int  # of `done`: taken from a cache
    eta: float | None  # seconds to the end of the prefill, waiting included; None: unknown
    output_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """The engine at this moment; `_total` counts from its start."""

    requests_waiting: int = 0
    requests_running: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by running requests, open sessions and pins
    pages_cached: int = 0  # free for the taking, but still good for a prefix
    pages_pinned: int = 0
    preemptions_total: int = 0
    evictions_total: int = 0  # pages whose content was given up for another
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # of the prompt tokens: not computed again
    output_tokens_total: int = 0
    discarded_tokens_total: int = 0  # computed one step beyond a stop
    steps_total: int = 0
    requests_finished: dict[str, int] = field(default_factory=dict)  # by reason
