"""`qwen1m sparsity refine|report|crossover`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import demo_model_path
from .errors import ConfigError, RequestError

if TYPE_CHECKING:
    from .engine import Engine
    from .sparse_config import SparseSettings


def add_parsers(commands: Any, token_count: Callable[[str], int]) -> None:
    """Add `sparsity` and what it does to the commands of an argparse parser."""
    sparsity = commands.add_parser(
        "sparsity",
        help="budgets of sparse prefill: refine, report, crossover",
        description="Fit sparse prefill to a model, its texts and this machine.",
    )
    tools = sparsity.add_subparsers(required=True, metavar="TOOL")

    refine = tools.add_parser(
        "refine",
        help="raise budgets until attention recall is high enough",
        description="Write sparse_attention_config.json for a checkpoint, from long texts like "
        "those it will read. Stop it at any time: the same command continues.",
    )
    refine.set_defaults(run=_refine)
    _add_model(refine)
    _add_text(refine, token_count)
    refine.add_argument("--threshold", type=float, default=0.95, metavar="X",
                        help="recall that every head has to reach (default: 0.95)")  # fmt: skip
    refine.add_argument("--start", type=_pair, default=None, metavar="V,S",
                        help="first budgets: columns,diagonals (default: 130,100)")  # fmt: skip
    refine.add_argument("--passes", type=int, default=3, metavar="N",
                        help="over the texts at most (default: 3)")  # fmt: skip
    refine.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the files written (default: the checkpoint's)")  # fmt: skip
    refine.add_argument("--positions", choices=("critical", "real"), default="critical",
                        help="of the rows that select; see docs/sparsity.md")  # fmt: skip
    refine.add_argument("--share-group", action="store_true",
                        help="one selection for the query heads of a KV head")  # fmt: skip
    refine.add_argument("-q", "--quiet", action="store_true", help="no bar")

    report = tools.add_parser(
        "report",
        help="recall per layer and head, keys kept, predicted speed-up",
        description="Describe what `refine` has measured.",
    )
    report.set_defaults(run=_report)
    report.add_argument("-m", "--model", default=str(demo_model_path()), help="checkpoint")
    report.add_argument("--dir", type=Path, help="where refine wrote (default: the checkpoint)")
    report.add_argument("--png", type=Path, metavar="FILE", help="also draw (extra: plot)")

    crossover = tools.add_parser(
        "crossover",
        help="measure from which length on sparse prefill is faster here",
        description="Write sparse_crossover.json, which --attention auto goes by.",
    )
    crossover.set_defaults(run=_crossover)
    _add_model(crossover)
    _add_text(crossover, token_count)
    crossover.add_argument("--out", type=Path, metavar="DIR",
                           help="folder of the file (default: the checkpoint's)")  # fmt: skip


def _pair(text: str) -> tuple[int, int]:
    try:
        vertical, slash = (int(part) for part in text.split(","))
    except ValueError:
        vertical = slash = 0
    if vertical < 1 or slash < 1:
        raise argparse.ArgumentTypeError(f"expected two counts such as 130,100, got {text!r}")
    return vertical, slash


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default=str(demo_model_path()),
                        help="checkpoint directory (default: the demo model)")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")


def _add_text(parser: argparse.ArgumentParser, token_count: Callable[[str], int]) -> None:
    parser.add_argument("--text", type=Path, action="append", metavar="FILE",
                        help="a long UTF-8 text; may be repeated")  # fmt: skip
    parser.add_argument("--haystacks", type=int, default=0, metavar="N",
                        help="or this many built-in texts with hidden facts")  # fmt: skip
    parser.add_argument("--tokens", type=token_count, default=131_072, metavar="N",
                        help="of each text at most (default: 128k)")  # fmt: skip


def _settings(args: argparse.Namespace) -> SparseSettings:
    from .sparse_config import SparseSettings

    return SparseSettings(positions=args.positions, share_group=args.share_group)


def _load(args: argparse.Namespace, extra_tokens: int = 0) -> Engine:
    from .engine import Engine

    return Engine(
        args.model,
        dtype=args.dtype,
        device="cpu",  # the tools look at a step's inside
        attention="sparse",
        max_model_len=args.tokens + extra_tokens,
        enable_prefix_caching=False,
    )


def _texts(args: argparse.Namespace, engine: Engine) -> list[tuple[str, list[int]]]:
    """(name, token ids) of the texts that the options name, cut to --tokens."""
    from .haystack import make_sample

    if engine.tokenizer is None:
        raise ConfigError(f"{args.model}: expected a tokenizer.json, found none")
    texts = [(str(path), path.read_text(encoding="utf-8")) for path in args.text or ()]
    for seed in range(args.haystacks):
        texts.append((f"haystack {seed}", make_sample(args.tokens, seed=900_000 + seed).prompt))
    if not texts:
        raise RequestError("texts: expected --text FILE or --haystacks N, got none")
    result = [(name, engine.tokenizer.encode(text)[: args.tokens]) for name, text in texts]
    for name, ids in result:
        if len(ids) < args.tokens:
            print(f"{name}: {len(ids):,} tokens (not {args.tokens:,})", file=sys.stderr)
    return result


def _refine(args: argparse.Namespace) -> int:
    from .refine import REPORT_FILE, START, refine
    from .sparse_config import FILE_NAME
    from .sparsity_report import report_lines
    from .terminal import PrefillBar

    engine = _load(args)
    texts = _texts(args, engine)
    folder = args.out or Path(args.model)
    folder.mkdir(parents=True, exist_ok=True)
    bars: list[PrefillBar] = []

    def show(progress: Any) -> None:
        if not bars or progress.done < bars[-1].done:
            for bar in bars:
                bar.close()
            bars.append(PrefillBar(progress.total))
        bars[-1](progress)

    try:
        report = refine(
            engine,
            texts,
            folder / REPORT_FILE,
            threshold=args.threshold,
            start=args.start or START,
            max_passes=args.passes,
            settings=_settings(args),
            on_progress=None if args.quiet else show,
        )
    finally:
        for bar in bars:
            bar.close()
    report.config("refinement").save(folder / FILE_NAME)
    print("\n".join(report_lines(report, engine.dual_chunk)))
    print(f"written: {folder / FILE_NAME}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .config import load_config
    from .refine import REPORT_FILE, RefineReport
    from .sparsity_report import draw, report_lines

    report = RefineReport.load((args.dir or Path(args.model)) / REPORT_FILE)
    print("\n".join(report_lines(report, load_config(args.model).dual_chunk)))
    if args.png:
        draw(report, args.png)
        print(f"written: {args.png}")
    return 0


def _crossover(args: argparse.Namespace) -> int:
    from .crossover import measure

    engine = _load(args, extra_tokens=1)
    _, ids = _texts(args, engine)[0]
    print("tokens      dense       sparse")

    def show(sample: dict[str, float]) -> None:
        dense, sparse = sample["dense_seconds"], sample["sparse_seconds"]
        print(f"{sample['tokens']:>9,.0f} {dense:9.3f} s {sparse:9.3f} s", flush=True)

    command = "qwen1m " + shlex.join(sys.argv[1:])
    found = measure(engine, ids, command=command, on_sample=show)
    path = found.save(args.out or Path(args.model))
    print(f"equally fast at {found.tokens:,} tokens; written: {path}")
    return 0
