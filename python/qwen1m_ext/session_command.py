"""`qwen1m sessions`: read a document once, keep its cache on disk, ask about it later."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RequestError, SessionFileError

if TYPE_CHECKING:
    from .llm import LLM
    from .request import SamplingParams

Load = Callable[[argparse.Namespace], "tuple[LLM, SamplingParams]"]
ReadPrompt = Callable[[argparse.Namespace], str]


def default_session_dir() -> Path:
    """Where sessions are saved unless told otherwise: $XDG_DATA_HOME/qwen1m/sessions."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "qwen1m" / "sessions"


def add_commands(
    parser: argparse.ArgumentParser,
    add_model: Callable[[argparse.ArgumentParser], None],
    load: Load,
    read_prompt: ReadPrompt,
) -> None:
    """The four commands; the model's options, its loading and reading of prompts are cli.py's."""
    commands = parser.add_subparsers(required=True, metavar="ACTION")
    actions = {
        "save": ("read a text and save its cache", lambda a: _save(a, load, read_prompt)),
        "load": ("verify a saved session; with a prompt, go on from it",
                 lambda a: _load(a, load, read_prompt)),
        "list": ("what is saved", _list),
        "rm": ("delete saved sessions", _remove),
    }  # fmt: skip
    for name, (text, run) in actions.items():
        action = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        action.set_defaults(run=run)
        action.add_argument("--session-dir", type=Path, default=default_session_dir(),
                            metavar="DIR", help="default: %(default)s")  # fmt: skip
        if name == "rm":
            action.add_argument("names", nargs="+", metavar="NAME")
        if name in ("save", "load"):
            action.add_argument("name", metavar="NAME")
            action.add_argument("prompt", nargs="?", help="a text; '-': standard input")
            action.add_argument("-f", "--file", type=Path, help="read the text from a UTF-8 file")
            add_model(action)
    commands.choices["save"].add_argument(
        "--freeze-temperature",
        action="store_true",
        help="beyond the trained length, keep this text's attention temperature for what follows, "
        "so that the cache is reused there too",
    )


def _save(args: argparse.Namespace, load: Load, read_prompt: ReadPrompt) -> int:
    from dataclasses import replace

    from .memory import format_bytes
    from .session_files import save_session, session_path
    from .terminal import PrefillBar

    session_path(args.session_dir, args.name)  # a bad name is told before the work
    text = read_prompt(args)
    llm, params = load(args)
    ids = llm.get_tokenizer().encode(text)
    session = llm.open_session(freeze_temperature=args.freeze_temperature)
    bar = None if args.quiet else PrefillBar(len(ids))
    try:
        handle = llm.engine.submit(
            ids, replace(params, max_tokens=1, n=1), session=session, on_progress=bar
        )
        handle.result()
        handle.wait()
    finally:
        if bar:
            bar.close()
    info = save_session(llm.engine, session, args.session_dir, args.name)
    print(f"{info.path}: {info.num_tokens:,} tokens, {format_bytes(info.file_bytes)}")
    return 0


def _load(args: argparse.Namespace, load: Load, read_prompt: ReadPrompt) -> int:
    from .session_files import load_session, session_path
    from .terminal import closing_line

    path = session_path(args.session_dir, args.name)
    given = args.prompt is not None or args.file is not None
    text = read_prompt(args) if given else ""
    llm, params = load(args)
    start = time.perf_counter()
    session = load_session(llm.engine, path)
    if not args.quiet:
        seconds = time.perf_counter() - start
        tokens = len(session.token_ids)
        print(f"{path}: {tokens:,} tokens verified and loaded in {seconds:.2f} s", file=sys.stderr)
    if not given:
        return 0
    ids = session.token_ids + llm.get_tokenizer().encode(text)
    shown = 0
    for output in llm.stream({"prompt_token_ids": ids}, params, session=session):
        print(output.outputs[0].text[shown:], end="", flush=True)
        shown = len(output.outputs[0].text)
    print(flush=True)
    if not args.quiet:
        print(closing_line(output.metrics), file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    from .memory import format_bytes
    from .session_files import list_sessions

    damaged = 0
    for entry in list_sessions(args.session_dir):
        if isinstance(entry, SessionFileError):
            damaged += 1
            print(f"{entry}", file=sys.stderr)
        else:
            size = format_bytes(entry.file_bytes)
            print(
                f"{entry.name:24} {entry.num_tokens:>10,} tokens {size:>10}"
                f"  {entry.created}  {entry.model}"
            )
    return 2 if damaged else 0


def _remove(args: argparse.Namespace) -> int:
    from .session_files import remove_session

    for name in args.names:
        try:
            remove_session(args.session_dir, name)
        except FileNotFoundError:
            raise RequestError(
                f"session: there is no saved session {name!r} in {args.session_dir}"
            ) from None
    return 0
