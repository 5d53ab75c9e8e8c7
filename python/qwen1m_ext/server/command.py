"""The options of `qwen1m serve`. Imports nothing heavy: `qwen1m --help` reads it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import BackendError
from ..session_command import default_session_dir

_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--host", {"default": "127.0.0.1", "help": "default: this machine only"}),
    ("--port", {"type": int, "default": 8000}),
    ("--served-model-name", {"metavar": "NAME", "help": "as clients call it (default: directory)"}),
    ("--api-key", {"action": "append", "metavar": "KEY",
                   "help": "asked of clients; may be repeated (or: QWEN1M_API_KEY)"}),
    ("--max-num-seqs", {"type": int, "default": 64, "metavar": "N", "help": "computed at once"}),
    ("--max-queue", {"type": int, "default": 256, "metavar": "N",
                     "help": "requests that may wait; more get 429"}),
    ("--prefill-chunk-tokens", {"type": int, "default": 32_768, "metavar": "N",
                                "help": "of a prompt that are computed at a time"}),
    ("--max-itl-ms", {"type": float, "default": 500.0, "metavar": "MS",
                      "help": "bound of the time between two tokens while prompts are read"}),
    ("--max-chunk-ms", {"type": float, "default": 2000.0, "metavar": "MS",
                        "help": "of a prompt computed at a time while no answer is under way"}),
    ("--max-body-bytes", {"type": int, "default": 64 << 20, "metavar": "N",
                          "help": "larger bodies get 413"}),
    ("--keep-alive-seconds", {"type": float, "default": 10.0, "metavar": "S",
                              "help": "silence on a stream before a comment is sent"}),
    ("--engine-timeout-seconds", {"type": float, "default": 60.0, "metavar": "S",
                                  "help": "without progress after which the engine's process is "
                                  "replaced; a step has at least ten times its predicted time"}),
    ("--drain-seconds", {"type": float, "default": 600.0, "metavar": "S",
                         "help": "time for running requests after SIGTERM"}),
    ("--session-dir", {"type": Path, "metavar": "DIR",
                       "help": "of saved sessions (default: ~/.local/share/qwen1m/sessions)"}),
    ("--no-prefix-caching", {"action": "store_true"}),
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options besides the model's."""
    for name, options in _OPTIONS:
        text = options.get("help", "")
        if options.get("default") and "default" not in text:
            text += (
                f" (default: {options['default']})" if text else f"default: {options['default']}"
            )
        parser.add_argument(name, **options | {"help": text})


def run(args: argparse.Namespace) -> int:
    """Serve."""
    try:
        from .run import listen, run_server
        from .settings import Settings
    except ImportError as error:
        raise BackendError(
            f"serve: {error.name} is not installed; "
            'pip install "qwen1m_ext[serve]" provides all that the server needs'
        ) from None
    keys = args.api_key or [key for key in [os.environ.get("QWEN1M_API_KEY")] if key]
    engine: dict[str, Any] = {
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv,
        "device": args.device,
        "rope": args.rope,
        "attention": args.attention,
        "sparse_config": args.sparse_config,
        "speculative": args.speculative,
        "kv_offload": args.kv_offload,
        "device_kv_bytes": args.device_kv_bytes,
        "cuda_graphs": not args.no_cuda_graphs,
        "max_model_len": args.max_model_len,
        "prefill_chunk_tokens": args.prefill_chunk_tokens,
        "max_num_seqs": args.max_num_seqs,
        "max_itl_ms": args.max_itl_ms,
        "max_chunk_ms": args.max_chunk_ms,
        "enable_prefix_caching": not args.no_prefix_caching,
    }
    settings = Settings(
        model_dir=Path(args.model),
        served_name=args.served_model_name or Path(args.model).resolve().name,
        api_keys=tuple(keys),
        max_body_bytes=args.max_body_bytes,
        max_queue=args.max_queue,
        keep_alive_seconds=args.keep_alive_seconds,
        engine_timeout_seconds=args.engine_timeout_seconds,
        drain_seconds=args.drain_seconds,
        session_dir=args.session_dir or default_session_dir(),
        engine=engine,
    )
    with listen(args.host, args.port) as listener:
        return run_server(settings, listener)
