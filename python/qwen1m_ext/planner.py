"""`qwen1m plan`: will it fit, how long will it take, and what would make it fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .config import ModelConfig, read_config
from .errors import ConfigError
from .estimate import CARDS, SPARSE_COLUMNS, Machine, Seconds, estimate, link_bytes, measure_cpu
from .fp8 import FP8
from .memory import available_bytes, format_bytes
from .offload import SLOTS, check_budget, check_options, layer_bytes
from .plan import PREFILL_CHUNK_TOKENS, Deployment, MemoryPlan, largest_context, memory_plan
from .terminal import format_seconds

DTYPES = {"bf16": torch.bfloat16, "fp8": FP8, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHORTER_CHUNKS = (16_384, 8_192, 4_096)
"""What the activations of a prefill chunk may be cut down to; below it products lose speed."""

# What a change costs its user, in no unit: a smaller chunk is felt least, fp8 has to be judged by
# its accuracy report, another card costs money, and behind an offloaded cache every token
# waits for the link. A shorter context costs 20 and the percentage that is given up.
PRICES = {
    "chunk": 1,
    "weights": 10,
    "kv": 12,
    "attention": 30,
    "context": 20,
    "gpu": 100,
    "kv-offload": 60,
}


@dataclass(frozen=True)
class Change:
    """A set of options that makes a deployment fit."""

    options: dict[str, str]  # option: value, as on the command line
    total: int  # bytes


def cheapest_changes(
    config: ModelConfig, deployment: Deployment, machine: Machine, count: int = 3
) -> list[Change]:
    """The `count` cheapest sets of changes that fit, none of which contains another."""
    found: list[Change] = []
    for _, options, model, changed, memory in sorted(
        _candidates(config, deployment, machine), key=lambda candidate: candidate[0]
    ):
        if any(done.options.items() <= options.items() for done in found):
            continue  # more than is needed
        total = memory_plan(model, changed).total
        if total <= memory:
            found.append(Change(options, total))
        if len(found) == count:
            break
    return found


def _candidates(
    config: ModelConfig, d: Deployment, machine: Machine
) -> Iterator[tuple[float, dict[str, str], ModelConfig, Deployment, int]]:
    """(price, options, model, deployment, bytes available) of all combinations worth a thought."""
    chunks = [d.chunk_tokens, *(c for c in SHORTER_CHUNKS if c < d.chunk)]
    models = [config, *([] if config.quantised else [replace(config, quantised=True)])]
    kvs = [d.kv_dtype, *([FP8] if d.kv_dtype != FP8 else [])]
    sparse = [d.sparse, *([False] if d.sparse else [])]
    offloads = [d.kv_offload, *([True] if machine.gpu and not d.kv_offload else [])]
    larger = [card for card in CARDS.values() if card.memory > machine.memory and machine.gpu]
    machines = [machine, *sorted(larger, key=lambda card: card.memory)]
    for (c, chunk), model, kv, s, offload, (m, where) in product(
        enumerate(chunks), models, kvs, sparse, offloads, enumerate(machines)
    ):
        options: dict[str, str] = {}
        price = 0.0
        if c:
            options["chunk"], price = f"{chunk // 1024}k", price + PRICES["chunk"] * c
        if model is not config:
            options["weights"], price = "fp8", price + PRICES["weights"]
        if kv != d.kv_dtype:
            options["kv"], price = "fp8", price + PRICES["kv"]
        if s != d.sparse:
            options["attention"], price = "dense", price + PRICES["attention"]
        if offload != d.kv_offload:
            options["kv-offload"], price = "host", price + PRICES["kv-offload"]
        if m:
            options["gpu"], price = where.name, price + PRICES["gpu"] + m
        changed = replace(d, chunk_tokens=chunk, kv_dtype=kv, sparse=s, kv_offload=offload)
        if options:
            yield price, options, model, changed, where.memory
        if c or m:
            continue
        tokens = largest_context(model, changed, where.memory) // 1024 * 1024
        if 0 < tokens < d.tokens:
            price += PRICES["context"] + 100 * (1 - tokens / d.tokens)
            shorter = replace(changed, tokens=tokens)
            options = {**options, "context": f"{tokens // 1024}k"}
            yield price, options, model, shorter, where.memory


@dataclass(frozen=True)
class Report:
    """Everything that `qwen1m plan` says."""

    model: str
    config: ModelConfig
    deployment: Deployment
    machine: Machine
    memory: MemoryPlan
    changes: list[Change]
    floor: Seconds
    expected: Seconds
    columns: int

    @property
    def fits(self) -> bool:
        """Whether everything is in memory at once."""
        return self.memory.total <= self.machine.memory

    @property
    def weights(self) -> str:
        """Format of the linear layers."""
        return "fp8" if self.config.quantised else NAMES[self.deployment.dtype]

    @property
    def beyond_model(self) -> bool:
        """Whether the context is longer than the model claims to support."""
        return self.deployment.tokens > self.config.max_position_embeddings

    def notes(self) -> Iterator[str]:
        """What the figures do not say by themselves."""
        d = self.deployment
        if self.beyond_model:
            yield (
                f"beyond the model: it supports {self.config.max_position_embeddings:,} tokens "
                "(max_position_embeddings); the engine refuses more"
            )
        if d.gpu:
            yield "for a GPU this is arithmetic from stated rates, not a measurement"
        if d.kv_dtype == FP8:
            yield "an fp8 cache suffers from large key biases: `qwen1m quantize` reports how much"
        away = len(d.streamed_layers(self.config))
        if away:
            locked = " page-locked" if d.gpu else ""
            moved = link_bytes(self.config, d)
            yield (
                f"kv offload: {away} of {self.config.num_layers} layers in{locked} host memory, "
                f"{format_bytes(moved.loaded)} over the link in a prefill, "
                f"{format_bytes(moved.step)} for each token"
            )
            stay, size = self._more_layers() if d.gpu else (0, 0)
            if stay:
                yield (
                    f"there is room for {stay} of them: --device-kv-bytes {size} keeps them on "
                    "the device"
                )
        if d.sparse:
            yield f"sparse attention: {self.columns:,} columns per row assumed (--columns)"

    def _more_layers(self) -> tuple[int, int]:
        """How many layers in host memory fit on the device beside the rest; the budget for them."""
        d, config = self.deployment, self.config
        away, size = len(d.streamed_layers(config)), layer_bytes(config, d.kv_dtype, d.tokens)
        held = SLOTS + config.num_layers - away
        for budget in range(config.num_layers, held, -1):
            changed = replace(d, device_kv_bytes=budget * size)
            if memory_plan(config, changed).fits(self.machine.memory):
                return away - len(changed.streamed_layers(config)), budget * size
        return 0, 0

    def as_json(self) -> dict[str, Any]:
        """For programs; times in seconds, sizes in bytes."""
        d = self.deployment

        def seconds(s: Seconds) -> dict[str, float]:
            return vars(s) | {"prefill": s.prefill, "decode_tokens_per_s": 1 / s.decode_step}

        return {
            "model": self.model,
            "context_tokens": d.tokens,
            "beyond_model": self.beyond_model,
            "machine": self.machine.name,
            "weights": self.weights,
            "kv": NAMES[d.kv_dtype],
            "attention": "sparse" if d.sparse else "dense",
            "chunk_tokens": d.chunk_tokens,
            "bytes": self.memory.items | {"total": self.memory.total},
            "host_bytes": self.memory.host,
            "available_bytes": self.machine.memory,
            "fits": self.fits,
            "changes": [{"options": c.options, "total_bytes": c.total} for c in self.changes],
            "floor_s": seconds(self.floor),
            "estimate_s": seconds(self.expected),
            "rates": {
                "matmul_flops": self.machine.matmul,
                "fp8_matmul_flops": self.machine.fp8_matmul,
                "bytes_per_s": self.machine.bandwidth,
                "link_bytes_per_s": self.machine.link,
                "source": self.machine.source,
            },
            "notes": list(self.notes()),
        }

    def as_text(self) -> Iterator[str]:
        """For people, line by line."""
        d, machine = self.deployment, self.machine
        attention = "sparse" if d.sparse else "dense"
        yield (
            f"{self.model}: {d.tokens:,} tokens on {machine.name}, weights "
            f"{self.weights}, kv {NAMES[d.kv_dtype]}, {attention} attention, "
            f"chunks of {d.chunk:,}"
        )
        for name, size in self.memory.items.items():
            yield f"  {name:<14}{format_bytes(size):>12}"
        yield f"  {'total':<14}{format_bytes(self.memory.total):>12}"
        yield f"  {'available':<14}{format_bytes(machine.memory):>12}"
        for name, size in self.memory.host.items():
            yield f"  {'host ' + name:<14}{format_bytes(size):>12}"
        over = self.memory.total - machine.memory
        if self.fits:
            yield f"fits, {format_bytes(-over)} to spare"
        else:
            yield f"does not fit: {format_bytes(over)} too much"
            for change in self.changes:
                flags = " ".join(f"--{name} {value}" for name, value in change.options.items())
                yield f"  fits with {flags} ({format_bytes(change.total)})"
            if not self.changes:
                yield "  no smaller setting fits"
        for name, s in (("floor", self.floor), ("estimate", self.expected)):
            yield (
                f"{name:<9} first token {format_seconds(s.prefill)} (linear "
                f"{format_seconds(s.linear)}, attention {format_seconds(s.attention)}, other "
                f"{format_seconds(s.elementwise)}); then {1000 * s.decode_step:.1f} ms a token "
                f"({1 / s.decode_step:.1f} tok/s)"
            )
        yield (
            f"rates: {machine.matmul / 1e12:.3g} TFLOP/s, {machine.bandwidth / 1e12:.3g} TB/s, "
            f"from host memory {machine.link / 1e9:.3g} GB/s "
            f"({machine.source})"
        )
        for note in self.notes():
            yield f"note: {note}"


def plan_report(
    model: str | Path,
    tokens: int,
    *,
    machine: str = "cpu",
    weights: str | None = None,
    kv: str | None = None,
    sparse: bool = False,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    memory: int | None = None,
    columns: int = SPARSE_COLUMNS,
    kv_offload: str | None = None,
    device_kv_bytes: int | None = None,
) -> Report:
    """Plan a deployment.

    Args:
        model: a checkpoint directory, or a config.json by itself.
        tokens: of prompt plus output.
        machine: "cpu" (this one) or a name of `CARDS`.
        weights: of the linear layers: bf16, fp32 or fp8; None: as the config says.
        kv: the cache: bf16, fp32 or fp8; None: as the activations.
        sparse: vertical-slash prefill.
        chunk_tokens: of a prefill chunk.
        memory: bytes available, if not what the machine has.
        columns: keys that a row of sparse attention meets.
        kv_offload: "host": layers of the cache wait in host memory.
        device_kv_bytes: with it, what the device holds of the cache; None: two layers.

    Raises:
        ConfigError: the config, or an argument above, is not understood.
    """
    path = Path(model)
    config = read_config(path if path.is_file() else path / "config.json")
    if machine != "cpu" and machine not in CARDS:
        raise ConfigError(f"gpu: expected cpu or one of {', '.join(CARDS)}, got {machine!r}")
    for name, value in (("weights", weights), ("kv", kv)):
        if value is not None and value not in DTYPES:
            raise ConfigError(f"{name}: expected one of {', '.join(DTYPES)}, got {value!r}")
    dtype = torch.float32 if config.dtype == torch.float32 else torch.bfloat16
    if weights:
        config = replace(config, quantised=weights == "fp8")
        dtype = DTYPES[weights] if weights != "fp8" else dtype
    deployment = Deployment(
        tokens=tokens,
        dtype=dtype,
        kv_dtype=DTYPES[kv] if kv else dtype,
        chunk_tokens=chunk_tokens,
        sparse=sparse,
        gpu=machine != "cpu",
        kv_offload=kv_offload is not None,
        device_kv_bytes=device_kv_bytes,
    )
    check_options(kv_offload, device_kv_bytes)
    check_budget(config, deployment.kv_dtype, tokens, device_kv_bytes)
    if machine == "cpu":
        memory = memory or available_bytes()
        if memory is None:
            raise ConfigError("memory: expected a number of GiB, as this system does not tell it")
        where = measure_cpu(config, dtype, memory)
    else:
        where = replace(CARDS[machine], memory=memory or CARDS[machine].memory)
    plan = memory_plan(config, deployment)
    fits = plan.total <= where.memory
    return Report(
        model=(path.resolve().parent if path.name == "config.json" else path.resolve()).stem,
        config=config,
        deployment=deployment,
        machine=where,
        memory=plan,
        changes=[] if fits else cheapest_changes(config, deployment, where),
        floor=(both := estimate(config, deployment, where, columns))[0],
        expected=both[1],
        columns=columns,
    )


def run_plan(report: Report, *, as_json: bool) -> int:
    """Print a report; returns 0 if it fits, else 1."""
    print(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.as_text()))
    return 0 if report.fits else 1
