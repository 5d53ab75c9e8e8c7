"""What an engine in a process of its own and its parent say to each other, pickled over a socket.

Parent to child: `Start` once, then `Call` and `Cancel`. Child to parent: `Beat`s while it loads,
`Facts` or `LoadFailed` once, then `Batch`es, with `Beat`s among their items. The end of the stream
is the end of the other process.
"""

from __future__ import annotations

import pickle
from array import array
from dataclasses import dataclass
from typing import Any

import torch

from .config import DualChunkConfig, GenerationConfig, ModelConfig
from .errors import BackendError
from .events import EngineStats, Event, RequestStatus
from .request import SamplingParams

TOKEN_ARRAY = "i"
"""Token ids travel as arrays of this type: four bytes each, copied and not pickled one by one."""


@dataclass(frozen=True)
class Start:
    """Load this."""

    model_dir: str
    arguments: dict[str, Any]  # of `Engine`
    timeout_seconds: float  # without progress that are too long, see `heartbeat.py`


@dataclass(frozen=True)
class Facts:
    """What was loaded, as far as a caller of the engine asks for it."""

    config: ModelConfig
    generation_config: GenerationConfig
    dual_chunk: DualChunkConfig
    dtype: torch.dtype
    max_model_len: int
    eos_token_ids: frozenset[int]
    prefill: str  # `PrefillPolicy.describe`


@dataclass(frozen=True)
class LoadFailed:
    """It could not be loaded."""

    error: BaseException


@dataclass(frozen=True)
class Submit:
    """A request: the argument of the call `submit`."""

    token_ids: array[int]
    params: SamplingParams
    prompt_text: str | None
    priority: int
    request_id: str
    session: int | None
    pin: bool
    json_schema: dict[str, Any] | None
    grammar: str | None


@dataclass(frozen=True)
class Cancel:
    """Cancel a request; not answered."""

    request_id: str


@dataclass(frozen=True)
class Call:
    """Do something and answer with the same number."""

    number: int
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Reply:
    """The answer to a call."""

    number: int
    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class SessionState:
    """An open session, without its token ids."""

    number: int
    num_tokens: int
    temperature: float | None


@dataclass(frozen=True)
class Released:
    """A request has given back what it held."""

    request_id: str
    status: RequestStatus


@dataclass(frozen=True)
class Beat:
    """A sign of life, every `heartbeat.tick_seconds`."""

    stuck: str | None  # what makes no progress


Item = tuple[str, Event] | SessionState | Released | Reply | Beat
"""(request id, event), or one of the others."""


@dataclass(frozen=True)
class Batch:
    """What has happened, in order, and how things stand after it."""

    items: list[Item]
    stats: EngineStats | None  # None: as told before
    statuses: dict[str, RequestStatus] | None


def portable(error: BaseException) -> BaseException:
    """An exception that survives the way: itself, or a BackendError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return BackendError(f"{type(error).__name__}: {error}")
    return error
