"""The `qwen1m` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, demo_model_path, sparsity_commands
from .benchmark.command import add_commands as add_bench_commands
from .errors import Qwen1mError, RequestError
from .server import command as serve_command
from .session_command import add_commands as add_session_commands

if TYPE_CHECKING:
    from .llm import LLM
    from .request import SamplingParams

DEMO_TOKENS = 32_768
"""Default length of the demo: ends in about a minute on two cores."""

_SAMPLING: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}


_UNITS = {"k": 1024, "m": 1_000_000}


def token_count(text: str) -> int:
    """Parse a number of tokens: 5000, 32k (k = 1,024) or 1m (m = 1,000,000)."""
    digits, unit = (text[:-1], text[-1].lower()) if text and text[-1].isalpha() else (text, "")
    try:
        count = round(float(digits) * _UNITS[unit]) if unit else int(digits)
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a count such as 5000, 32k or 1m, got {text!r}")
    return count


def gibibytes(text: str) -> int:
    """Parse a number of GiB, in bytes: 80 or 23.5."""
    try:
        size = round(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected GiB such as 80 or 23.5, got {text!r}")
    return size


def byte_count(text: str) -> int:
    """Parse a number of bytes: 1000000, 512m or 8g (k, m, g: powers of 1,024)."""
    unit = "kmg".find(text[-1:].lower()) + 1
    try:
        size = round(float(text[:-1]) * 1024**unit) if unit and text else int(text)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected bytes such as 512m or 8g, got {text!r}")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns 0 (done), 1 (wrong answer), 2 (error), 130 (stopped) or 141 (nobody reads on).
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="qwen1m: %(message)s")
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader like `head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (Qwen1mError, OSError) as error:
        print(f"qwen1m: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqwen1m: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
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
    generate.add_argument(
        "--chat", action="store_true", help="send the prompt as a user message (chat template)"
    )
    generate.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    generate.add_argument("--ignore-eos", action="store_true")
    _add_model_and_sampling(generate)

    chat = commands.add_parser(
        "chat",
        help="a conversation; the cache is kept between turns",
        description="Talk to a model. Commands: /file PATH, /reset, /exit.",
    )
    chat.set_defaults(run=_chat)
    chat.add_argument(
        "--freeze-temperature",
        action="store_true",
        help="beyond the trained length, keep the first turn's attention temperature, "
        "so that the cache is reused there too",
    )
    _add_model_and_sampling(chat)

    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible HTTP server, with a page at /",
        description="Serve a model over HTTP (docs/server.md).",
    )
    serve.set_defaults(run=serve_command.run)
    _add_model(serve)
    serve_command.add_arguments(serve)

    sessions = commands.add_parser(
        "sessions",
        help="save, load, list, rm: caches on disk",
        description="Keep the cache of a long text on disk and go on from it later.",
    )
    add_session_commands(sessions, _add_model_and_sampling, _load, _read_prompt)

    bench = commands.add_parser(
        "bench",
        help="serve, prefill, decode: measure this machine",
        description="Latencies and throughput under the names that vLLM's bench uses.",
    )
    add_bench_commands(bench, _add_model, token_count)

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
    demo.add_argument("--attention", choices=("auto", "dense", "sparse", "both"),
                      help="both: the one after the other, compared (default: both up to 128k, "
                      "dense with --rope plain, else sparse)")  # fmt: skip
    demo.add_argument("--model", default=str(demo_model_path()), help=argparse.SUPPRESS)

    plan = commands.add_parser(
        "plan",
        help="will a context fit, and how long will it take",
        description="Bytes, fit and times from config.json alone: no weights, no GPU needed. "
        "Exit status 0: fits, 1: does not.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", metavar="MODEL_DIR_OR_CONFIG")
    plan.add_argument("--context", type=token_count, required=True, metavar="N",
                      help="prompt plus output: 128k, 1m, ...")  # fmt: skip
    plan.add_argument("--gpu", default="cpu", metavar="CARD",
                      help="h200, h100, h20, a100, a100-40g, l40s, rtx4090, or cpu: this "
                      "machine (default)")  # fmt: skip
    plan.add_argument("--weights", choices=("bf16", "fp8", "fp32"), help="of linear layers")
    plan.add_argument("--kv", choices=("bf16", "fp8", "fp32"), help="keys and values")
    plan.add_argument("--attention", choices=("dense", "sparse"), default="dense")
    plan.add_argument("--chunk", type=token_count, metavar="N", help="prefill chunk, 32k")
    plan.add_argument("--columns", type=token_count, metavar="N",
                      help="keys per row of sparse attention")  # fmt: skip
    _add_offload(plan)
    plan.add_argument("--memory", type=gibibytes, metavar="GIB", help="what is available")
    plan.add_argument("--json", action="store_true")

    quantize = commands.add_parser(
        "quantize",
        help="fp8 weights: half the memory, with an accuracy report",
        description="Write a checkpoint whose linear layers are in fp8 (e4m3, a scale per row); "
        "it loads like any other. Then both are compared on real text.",
    )
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", metavar="MODEL_DIR")
    quantize.add_argument("out", type=Path, metavar="OUT_DIR", help="must not exist yet")
    quantize.add_argument("--text", type=Path, metavar="FILE",
                          help="text of the report (default: Python's documentation)")  # fmt: skip
    quantize.add_argument("--report-tokens", type=token_count, default=4096, metavar="N",
                          help="length of the text, in tokens (default: 4k)")  # fmt: skip
    quantize.add_argument("--no-report", action="store_true", help="write the checkpoint only")
    quantize.add_argument("-q", "--quiet", action="store_true", help="no bar")

    sparsity_commands.add_parsers(commands, token_count)

    doctor = commands.add_parser(
        "doctor",
        help="versions, CPU features, operators, self-test; paste-ready",
        description="Describe this installation and check that it computes correctly.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default=str(demo_model_path()),
                        help="checkpoint directory (default: the demo model)")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--kv", choices=("auto", "fp8"), default="auto",
                        help="keys and values in fp8: half the cache")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-cuda-graphs", action="store_true",
                        help="on a GPU, launch decode steps op by op")  # fmt: skip
    parser.add_argument("--rope", choices=("auto", "dca", "plain"), default="auto")
    parser.add_argument("--attention", choices=("auto", "dense", "sparse"), default="auto",
                        help="of the prompt: exact, vertical-slash, or by its length")  # fmt: skip
    parser.add_argument("--sparse-config", type=Path, metavar="FILE",
                        help="budgets (default: the checkpoint's)")  # fmt: skip
    parser.add_argument("--speculative", choices=("ngram",),
                        help="guess ahead from earlier text: same output, fewer steps")  # fmt: skip
    _add_offload(parser)
    parser.add_argument("--max-model-len", type=token_count, metavar="N",
                        help="context to reserve for (default: the model's)")  # fmt: skip


def _add_offload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-offload", choices=("host",),
                        help="layers of the cache wait in host memory: same output")  # fmt: skip
    parser.add_argument("--device-kv-bytes", type=byte_count, metavar="N",
                        help="what the device then holds of it: 8g, 512m (default: two "
                        "layers)")  # fmt: skip


def _add_model_and_sampling(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--system", help="system message of a chat")
    parser.add_argument("--max-tokens", type=token_count, default=256, metavar="N")
    for name, kind in _SAMPLING.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar="X",
            help="sampling (default: the checkpoint's generation_config.json)",
        )
    parser.add_argument("-q", "--quiet", action="store_true", help="no bar, no closing line")


def _load(args: argparse.Namespace) -> tuple[LLM, SamplingParams]:
    """The model and the sampling that the options ask for."""
    from dataclasses import replace

    from .llm import LLM

    llm = LLM(
        args.model,
        dtype=args.dtype,
        kv_cache_dtype=args.kv,
        device=args.device,
        rope=args.rope,
        attention=args.attention,
        sparse_config=args.sparse_config,
        max_model_len=args.max_model_len,
        speculative=args.speculative,
        kv_offload=args.kv_offload,
        device_kv_bytes=args.device_kv_bytes,
        cuda_graphs=not args.no_cuda_graphs,
    )
    given = {name: getattr(args, name, None) for name in (*_SAMPLING, "stop", "ignore_eos")}
    params = replace(
        llm.get_default_sampling_params(),
        max_tokens=args.max_tokens,
        **{name: value for name, value in given.items() if value is not None},
    )
    return llm, params


def _read_prompt(args: argparse.Namespace) -> str:
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
        try:
            return sys.stdin.read()
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input: expected UTF-8 text: {error}") from None
    return str(args.prompt)


def _generate(args: argparse.Namespace) -> int:
    from .terminal import PrefillBar, closing_line

    prompt = _read_prompt(args)
    llm, params = _load(args)
    tokenizer = llm.get_tokenizer()
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": prompt})
        prompt = tokenizer.apply_chat_template(messages)
    elif args.system:
        raise RequestError("--system: expected together with --chat")
    ids = tokenizer.encode(prompt)
    bar = None if args.quiet else PrefillBar(len(ids))
    shown = 0
    try:
        for output in llm.stream({"prompt_token_ids": ids}, params, on_progress=bar):
            if bar and output.metrics.output_tokens == 1:
                bar.close()
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    finally:
        if bar:
            bar.close()
    print(flush=True)
    if not args.quiet:
        print(closing_line(output.metrics), file=sys.stderr)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from .chat import Chat, run_chat

    llm, params = _load(args)
    chat = Chat(
        llm,
        params,
        system=args.system,
        freeze_temperature=args.freeze_temperature,
        quiet=args.quiet,
    )
    try:
        return run_chat(chat, sys.stdin, "> " if sys.stdin.isatty() else "")
    finally:
        chat.close()


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor()


def _plan(args: argparse.Namespace) -> int:
    from .planner import plan_report, run_plan

    given = {"chunk_tokens": args.chunk, "columns": args.columns}
    report = plan_report(
        args.model,
        args.context,
        machine=args.gpu,
        weights=args.weights,
        kv=args.kv,
        sparse=args.attention == "sparse",
        memory=args.memory,
        kv_offload=args.kv_offload,
        device_kv_bytes=args.device_kv_bytes,
        **{name: value for name, value in given.items() if value is not None},
    )
    return run_plan(report, as_json=args.json)


def _quantize(args: argparse.Namespace) -> int:
    from .accuracy import read_text, run_report
    from .quantize import quantize_with_bar, store_kv_scales

    text = read_text(args.text)  # before the work, not after it
    quantize_with_bar(args.model, args.out, quiet=args.quiet)
    store_kv_scales(args.out)
    print(f"{args.out}: fp8 checkpoint, loads like any other")
    if not args.no_report:
        run_report(args.model, args.out, text, args.report_tokens)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    correct = run_demo(
        args.model,
        tokens=args.tokens,
        seed=args.seed,
        rope=args.rope,
        depth=args.depth,
        attention=args.attention,
    )
    return 0 if correct or args.rope == "plain" else 1
