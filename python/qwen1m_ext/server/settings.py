"""What `qwen1m serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """The server's settings; `engine` are the arguments of `Engine`."""

    model_dir: Path
    served_name: str
    session_dir: Path
    api_keys: tuple[str, ...] = ()  # none: open to everybody who can connect
    max_body_bytes: int = 64 << 20  # a million tokens as JSON numbers are 7 MB, as text 2 to 6 MB
    max_queue: int = 256  # requests that may wait; more are refused with 429
    keep_alive_seconds: float = 10.0  # silence on a stream after which a comment is sent
    engine_timeout_seconds: float = 60.0  # without progress: the engine's process is replaced
    drain_seconds: float = 600.0  # after SIGTERM: time for running requests to finish
    engine: dict[str, Any] = field(default_factory=dict)
