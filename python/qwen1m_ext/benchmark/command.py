"""The options of `qwen1m bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from ..engine import Engine

AddModel = Callable[[argparse.ArgumentParser], None]
TokenCount = Callable[[str], int]


def add_commands(
    parser: argparse.ArgumentParser, add_model: AddModel, token_count: TokenCount
) -> None:
    """The three benches; the model's options and `token_count` are cli.py's."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    serve = commands.add_parser("serve", help="load on a running server")
    serve.set_defaults(run=_serve)
    serve.add_argument("--url", default="http://127.0.0.1:8000")
    serve.add_argument("--model", help="default: the first that the server names")
    serve.add_argument("--api-key")
    serve.add_argument("--num-prompts", type=int, default=32, metavar="N")
    serve.add_argument("--request-rate", type=float, default=float("inf"), metavar="R",
                       help="per second, Poisson arrivals (default: all at once)")  # fmt: skip
    serve.add_argument("--max-concurrency", type=int, default=64, metavar="N")
    serve.add_argument("--input-len", type=token_count, default=1024, metavar="N")
    serve.add_argument("--output-len", type=token_count, default=128, metavar="N")
    serve.add_argument("--seed", type=int, default=0)

    prefill = commands.add_parser("prefill", help="time to the first token, by length")
    prefill.set_defaults(run=_prefill)
    prefill.add_argument("--input-len", type=token_count, nargs="+", metavar="N",
                         default=[1024, 8192, 32768])  # fmt: skip
    prefill.add_argument("--repeats", type=int, default=3, metavar="N")

    decode = commands.add_parser("decode", help="time per output token, by batch")
    decode.set_defaults(run=_decode)
    decode.add_argument("--input-len", type=token_count, default=1024, metavar="N")
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    decode.add_argument("--output-len", type=token_count, default=64, metavar="N")
    for command in (prefill, decode):
        add_model(command)
    for command in (serve, prefill, decode):
        command.add_argument("-o", "--output", type=Path, metavar="FILE", help="all of it as JSON")


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if not one > 0:
                raise RequestError(f"--{name.replace('_', '-')}: expected > 0, got {one}")


def _serve(args: argparse.Namespace) -> int:
    from .serve import ServeOptions, bench_serve
    from .summary import report

    _positive(args, "num_prompts", "request_rate", "max_concurrency")
    options = ServeOptions(
        args.url, args.model, args.num_prompts, args.request_rate, args.max_concurrency,
        args.input_len, args.output_len, args.api_key, args.seed,
    )  # fmt: skip
    result = bench_serve(options)
    errors = result.pop("errors")
    report(result, args.output)
    for error in errors:
        print(f"failed: {error}")
    return 0 if result["failed"] == 0 else 1


def _prefill(args: argparse.Namespace) -> int:
    from .model import bench_prefill
    from .summary import report

    _positive(args, "repeats")
    result = bench_prefill(_engine(args, max(args.input_len) + 1), args.input_len, args.repeats)
    report(result, args.output)
    return 0


def _decode(args: argparse.Namespace) -> int:
    from .model import bench_decode
    from .summary import report

    _positive(args, "batch")
    if args.output_len < 2:
        raise RequestError(f"--output-len: expected >= 2, got {args.output_len}")
    tokens = max(args.batch) * (args.input_len + args.output_len + 128)
    engine = _engine(args, tokens, max_num_seqs=max(args.batch))
    report(bench_decode(engine, args.input_len, args.batch, args.output_len), args.output)
    return 0


def _engine(args: argparse.Namespace, tokens: int, max_num_seqs: int = 1) -> Engine:
    """The model with room for `tokens` unless --max-model-len says otherwise."""
    from ..engine import Engine

    return Engine(
        args.model,
        dtype=args.dtype,
        kv_cache_dtype=args.kv,
        device=args.device,
        cuda_graphs=not args.no_cuda_graphs,
        rope=args.rope,
        attention=args.attention,
        sparse_config=args.sparse_config,
        max_model_len=args.max_model_len or tokens,
        load_tokenizer=False,
        enable_prefix_caching=False,
        max_num_seqs=max_num_seqs,
    )
