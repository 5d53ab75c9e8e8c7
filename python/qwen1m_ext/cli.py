"""The `qwen1m` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, demo_model_path

DEMO_TOKENS = 32_768
"""Default length of the demo: ends in about a minute on two cores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (0 done, 1 wrong answer, 2 error, 130 stopped)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="qwen1m: %(message)s")
    from .errors import Qwen1mError

    try:
        return int(args.run(args))
    except (Qwen1mError, OSError) as error:
        print(f"qwen1m: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqwen1m: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from .terminal import token_count

    parser = argparse.ArgumentParser(
        prog="qwen1m", description="Long-context inference for Qwen2.5-1M models."
    )
    parser.add_argument("--version", action="version", version=f"qwen1m_ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="complete a prompt", description="Complete a prompt; streams to stdout."
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", nargs="?", help="the prompt; '-' or nothing: standard input")
    generate.add_argument("-f", "--file", type=Path, help="read the prompt from a UTF-8 file")
    _add_model(generate)
    generate.add_argument(
        "--chat", action="store_true", help="send the prompt as a user message (chat template)"
    )
    generate.add_argument("--system", help="system message, with --chat")
    generate.add_argument("--max-tokens", type=token_count, default=256, metavar="N")
    generate.add_argument("--max-model-len", type=token_count, metavar="N",
                          help="reserve for so many tokens (default: the model's maximum)")  # fmt: skip
    for name, kind in (
        ("temperature", float), ("top_p", float), ("top_k", int), ("min_p", float),
        ("repetition_penalty", float), ("presence_penalty", float), ("frequency_penalty", float),
        ("seed", int),
    ):  # fmt: skip
        generate.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="X",
            help="sampling (default: the checkpoint's generation_config.json)",
        )  # fmt: skip
    generate.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    generate.add_argument("--ignore-eos", action="store_true")
    generate.add_argument("-q", "--quiet", action="store_true", help="no bar, no closing line")

    demo = commands.add_parser(
        "demo",
        help="find a fact hidden in a very long text",
        description="Hide 20 facts in English prose and ask the demo model for one of them.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--tokens", type=token_count, default=DEMO_TOKENS, metavar="N",
                      help="length of the text: 8k, 32k, 128k, ... (default: 32k)")  # fmt: skip
    demo.add_argument("--seed", type=int, help="repeat a run (default: a fresh seed, printed)")
    demo.add_argument("--depth", type=float, help="place of the fact, 0 to 1 (default: random)")
    demo.add_argument("--rope", choices=("auto", "dca", "plain"), default="auto",
                      help="plain: without Dual Chunk Attention, to see it fail")  # fmt: skip
    demo.add_argument("--model", default=str(demo_model_path()), help=argparse.SUPPRESS)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default=str(demo_model_path()),
                        help="checkpoint directory (default: the demo model)")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rope", choices=("auto", "dca", "plain"), default="auto")


def _read_prompt(args: argparse.Namespace) -> str:
    from .errors import RequestError

    if args.file is not None:
        if args.prompt is not None:
            raise RequestError("prompt: expected an argument or --file, got both")
        try:
            return str(args.file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"--file {args.file}: expected UTF-8 text: {error}") from None
    if args.prompt is None or args.prompt == "-":
        if args.prompt is None and sys.stdin.isatty():
            raise RequestError("prompt: expected an argument, --file or standard input, got none")
        return sys.stdin.read()
    return str(args.prompt)


def _generate(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from .llm import LLM
    from .terminal import PrefillBar, closing_line

    prompt = _read_prompt(args)
    llm = LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        rope=args.rope,
        max_model_len=args.max_model_len,
    )
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": prompt})
        prompt = llm.get_tokenizer().apply_chat_template(messages)
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                     "presence_penalty", "frequency_penalty", "seed", "stop")
        if (value := getattr(args, name)) is not None
    }  # fmt: skip
    params = replace(
        llm.get_default_sampling_params(),
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        **given,
    )
    ids = llm.get_tokenizer().encode(prompt)
    if args.quiet:
        stream = llm.stream({"prompt_token_ids": ids}, params)
    else:
        bar = PrefillBar(len(ids))
        stream = llm.stream({"prompt_token_ids": ids}, params, on_progress=bar)
    shown = 0
    for output in stream:
        if not args.quiet and shown == 0 and output.metrics.output_tokens == 1:
            bar.__exit__(None, None, None)
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print(flush=True)
    if not args.quiet:
        print(closing_line(output.metrics), file=sys.stderr)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    correct = run_demo(
        args.model, tokens=args.tokens, seed=args.seed, rope=args.rope, depth=args.depth
    )
    return 0 if correct or args.rope == "plain" else 1
