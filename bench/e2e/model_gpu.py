"""A whole model on a GPU: time to the first token and decode rate beside the planner's floor.

    python bench/e2e/model_gpu.py --json FILE [--models 7b 14b] [--lengths 131072 1000000]
        [--attention sparse dense] [--decode 64] [--seconds 600] [--card h200] [--no-cuda-graphs]

Needs a GPU, a build with CUDA kernels and memory for the model; nothing is downloaded. The shapes
are those of the published configurations, the weights are random (made on the device), the prompt
is random tokens. Sparse: budgets of 1,000 columns and 6,096 diagonals for every head, the most
frequent pair of the published ones; random weights have no pattern, so the diagonals are scattered
and more keys are loaded than for real text. 14b: with an fp8 cache. One run of each case, the
shortest first; one that is predicted not to end within --seconds is left out, one that does not is
stopped, and the row says so. The floor is `qwen1m plan`'s: what a plain matrix product and a plain
copy of that card allow.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from prefill_attention_sdpa import clocks

from qwen1m_ext import SamplingParams, _host
from qwen1m_ext.choices import missing_gpu
from qwen1m_ext.config import ModelConfig
from qwen1m_ext.device import Device
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import Qwen1mError
from qwen1m_ext.events import Progress
from qwen1m_ext.planner import plan_report
from qwen1m_ext.weights import LayerWeights, ModelWeights

CONFIGS = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "configs"
CACHES = {"7b": "auto", "14b": "fp8"}
SLACK = 3.0
"""A case is begun if that many times its floor is left."""


def random_weights(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: Device
) -> ModelWeights:
    """In place of `load_weights`: as large as trained ones, so that nothing over- or underflows."""
    generator = torch.Generator(device.where or "cpu").manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        matrix = torch.empty(shape, dtype=dtype, device=device.where)
        return matrix.normal_(0, std, generator=generator)

    def linear(out: int, inner: int) -> torch.Tensor:
        return normal(out, inner, std=inner**-0.5)

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device.where)

    c = config
    layers = tuple(
        LayerWeights(
            input_norm=ones(),
            qkv=linear(c.q_size + 2 * c.kv_size, c.hidden_size),
            qkv_bias=normal(c.q_size + 2 * c.kv_size, std=0.3),
            o=linear(c.hidden_size, c.q_size),
            post_norm=ones(),
            gate_up=linear(2 * c.intermediate_size, c.hidden_size),
            down=linear(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    )
    embed, head = (linear(c.vocab_size, c.hidden_size) for _ in range(2))
    return ModelWeights(embed, layers, ones(), head)


def build(model: str, tokens: int, cache: Any, graphs: bool, **options: Any) -> Engine:
    """An engine of that shape for one sequence of `tokens` tokens; `options` of `Engine`."""
    options = {"attention": "sparse", **options}
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIGS / f"qwen2.5-{model}-instruct-1m.json"
        (Path(folder) / "config.json").write_text(config.read_text())
        with patch("qwen1m_ext.engine.load_weights", random_weights):
            return Engine(
                folder, device="cuda", kv_cache_dtype=cache, max_model_len=tokens,
                max_num_seqs=1, load_tokenizer=False, enable_prefix_caching=False,
                cuda_graphs=graphs, **options,
            )  # fmt: skip


def run(
    engine: Engine, tokens: int, attention: Any, decode: int, deadline: float
) -> dict[str, Any]:
    """One prompt: what it cost, or how far it came."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(engine.config.vocab_size, (tokens,), generator=generator).tolist()
    reached = 0

    def progress(state: Progress) -> None:
        nonlocal reached
        reached = state.done
        if time.monotonic() > deadline:
            raise TimeoutError

    params = SamplingParams(temperature=0, max_tokens=decode, ignore_eos=True, attention=attention)
    torch.cuda.reset_peak_memory_stats()
    try:
        metrics = engine.submit(ids, params, on_progress=progress).result().metrics
    except TimeoutError:
        return {"stopped": f"after {reached} of {tokens} tokens: --seconds"}
    return {
        "ttft_s": metrics.time_to_first_token,
        "prefill_tokens_per_s": metrics.prefill_tokens_per_second,
        "decode_tokens_per_s": metrics.decode_tokens_per_second,
        "recall": metrics.recall,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def measure(model: str, arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """The rows of one model."""
    rows: list[dict[str, Any]] = []
    cases = [(n, a) for n in sorted(arguments.lengths) for a in arguments.attention]
    longest = max(arguments.lengths) + arguments.decode + 1
    begin = time.monotonic()
    try:
        engine = build(model, longest, CACHES[model], not arguments.no_cuda_graphs)
    except Qwen1mError as error:
        return [{"model": model, "error": str(error)}]
    start = {"start_s": time.monotonic() - begin, "plan_bytes": engine.plan.items}
    config = CONFIGS / f"qwen2.5-{model}-instruct-1m.json"
    for tokens, attention in cases:
        floor = plan_report(
            config, tokens, machine=arguments.card, sparse=attention == "sparse",
            kv=None if CACHES[model] == "auto" else CACHES[model], columns=7096,
        ).floor  # fmt: skip
        row: dict[str, Any] = {
            "model": model, "tokens": tokens, "attention": attention, "kv": CACHES[model],
            "decode_tokens": arguments.decode, "floor_ttft_s": floor.prefill,
            "floor_decode_tokens_per_s": 1 / floor.decode_step, **start,
        }  # fmt: skip
        left = deadline - time.monotonic()
        if SLACK * floor.prefill > left:
            row["skipped"] = f"{SLACK:g} times its floor is more than the {left:.0f} s left"
        else:
            try:
                row |= run(engine, tokens, attention, arguments.decode, deadline)
            except Exception as error:  # the other cases still say something
                row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    engine.shutdown(drain=False)
    return rows


def write(path: Path, clocks_before: Any, rows: list[dict[str, Any]]) -> None:
    """Rows, and what they were measured on."""
    environment = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "clocks_before": clocks_before,
        "clocks_after": clocks(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build": _host.build_info(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=sorted(CACHES), default=["7b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 1_000_000])
    parser.add_argument(
        "--attention", nargs="+", choices=("sparse", "dense"), default=["sparse", "dense"]
    )
    parser.add_argument("--decode", type=int, default=64, help="tokens after the first prompt's")
    parser.add_argument("--seconds", type=float, default=600, help="for all cases together")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="decode op by op")
    parser.add_argument("--card", default="h200", help="whose rates the floor takes")
    arguments = parser.parse_args()
    if missing := missing_gpu():
        sys.exit(f"needs a GPU and a build with CUDA kernels: {missing}")
    deadline = time.monotonic() + arguments.seconds
    before = clocks()
    rows = []
    for model in arguments.models:
        rows += measure(model, arguments, deadline)
        torch.cuda.empty_cache()
    write(arguments.json, before, rows)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
