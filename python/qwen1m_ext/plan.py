"""How many bytes a deployment needs, item by item, from config.json alone.

The engine asks here before it loads or allocates anything; `qwen1m plan` asks the same functions
for machines that are not at hand. Tests hold each item against what is really allocated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch

from .config import ModelConfig
from .decode_step import decode_step_bytes
from .errors import ConfigError, MemoryBudgetError
from .fp8 import FP8
from .kv_cache import cache_bytes, pages_for, widened_bytes
from .memory import format_bytes
from .model import activation_bytes, linear_scratch_bytes, logits_bytes
from .offload import SLOTS, layer_bytes, streamed_layers
from .sparsity import gather_bytes, score_bytes
from .weights import weight_bytes

log = logging.getLogger(__name__)

PREFILL_CHUNK_TOKENS = 32_768
"""Tokens of a prefill chunk: bounds the activations whatever the length of the prompt."""

RUNTIME_BYTES = 1_000_000_000
"""CUDA context, cuBLAS workspaces and what the driver keeps, on a GPU. An allowance, not measured
here; a context alone takes 0.4 to 0.6 GB on current drivers."""


STEP_INPUT_BYTES = 64
"""Of a row of a step: what is staged for a copy to a GPU (three numbers, aligned)."""

MOST_COLUMNS = 22_032
"""The largest budget of columns in the published configs of sparse prefill (7B)."""


@dataclass(frozen=True)
class Deployment:
    """What decides how many bytes a model needs."""

    tokens: int  # of the longest context, prompt plus output
    dtype: torch.dtype  # of activations and of all weights that are not quantised
    kv_dtype: torch.dtype  # dtype, or FP8 with a scale per (layer, head)
    chunk_tokens: int  # of a prefill chunk
    max_seqs: int = 1  # sequences that may be open at once; they share the context's pages
    decode_rows: int = 0  # decodes of other sequences that run in one step with a chunk
    sparse: bool = False  # vertical-slash prefill
    sparse_columns: int = MOST_COLUMNS  # with it: the largest budget of a head
    gpu: bool = False
    num_sms: int = 132  # multiprocessors of the GPU: those of an H200
    cuda_graphs: bool = True
    speculative: bool = False  # guesses are checked, on a GPU in steps prepared for them
    kv_offload: bool = False  # layers of the cache wait in host memory
    device_kv_bytes: int | None = None  # with it: what the device may hold; None: the slots

    @property
    def chunk(self) -> int:
        """Tokens that are really in a chunk."""
        return min(self.chunk_tokens, self.tokens)

    def graphs(self, config: ModelConfig) -> bool:
        """Whether decode steps are captured: not beside copies, which take far longer."""
        return self.cuda_graphs and not self.streamed_layers(config)

    def streamed_layers(self, config: ModelConfig) -> list[int]:
        """Layers of the cache whose home is host memory."""
        if not self.kv_offload:
            return []
        return streamed_layers(config, self.kv_dtype, self.tokens, self.device_kv_bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by item, in the order in which a person wants to see them."""

    items: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)  # page-locked, where a GPU has its own

    @property
    def total(self) -> int:
        """Bytes of all items, without the host's."""
        return sum(self.items.values())

    def fits(self, available: int | None, host_available: int | None = None) -> bool:
        """Whether everything is in memory at once; None: what is there is not known."""
        places = (self.items, available), (self.host, host_available)
        return all(there is None or sum(size.values()) <= there for size, there in places)


def memory_plan(config: ModelConfig, deployment: Deployment) -> MemoryPlan:
    """Bytes of everything that a deployment holds at its peak."""
    d = deployment
    rows = config.dual_chunk.table_rows(d.tokens, critical=d.sparse)
    items = {
        "weights": weight_bytes(config, d.dtype),
        "kv cache": cache_bytes(config, d.kv_dtype, d.tokens, d.max_seqs),
        "activations": activation_bytes(config, d.dtype, d.chunk + d.decode_rows),
        "rotary table": rows * config.head_dim * 4,
        "scratch": _scratch_bytes(config, d),
        "logits": logits_bytes(config, d.dtype, d.chunk + d.decode_rows),
    }
    if d.gpu:
        items["decode step"] = decode_step_bytes(
            config,
            d.dtype,
            rows=max(1, d.decode_rows),
            table_rows=d.max_seqs,
            max_tokens=d.tokens,
            num_sms=d.num_sms,
            graphs=d.graphs(config),
            speculative=d.speculative,
            chunk_tokens=d.chunk + d.decode_rows,
        )
        items["step inputs"] = stage_bytes(config, d)
        items["runtime"] = RUNTIME_BYTES
    streamed = len(d.streamed_layers(config))
    host = {}
    if streamed:
        size = layer_bytes(config, d.kv_dtype, d.tokens)
        items["kv slots"] = SLOTS * size
        if d.gpu:
            items["kv slots"] += streamed * size // pages_for(d.tokens)  # the bounce
            items["kv cache"] -= streamed * size
            host["kv cache"] = streamed * size
    return MemoryPlan(items, host)


def stage_bytes(config: ModelConfig, d: Deployment) -> int:
    """Bytes of a step's inputs, which the host writes and a GPU's copies read.

    Ids, positions and slots of each row; block tables (4 bytes a page, twice: rows of the last
    layer have their own), lengths and scales of each sequence; counts of a sampled one.
    """
    rows, sequences = d.chunk + d.decode_rows, d.max_seqs + 2
    per_sequence = 2 * 4 * pages_for(d.tokens) + 1024
    return STEP_INPUT_BYTES * rows + sequences * per_sequence + 8 * config.vocab_size + (1 << 20)


def _scratch_bytes(config: ModelConfig, d: Deployment) -> int:
    """What is held for a moment besides the activations.

    Sparse: the scores of the selection. With an fp8 cache: keys and values of one layer, widened
    once per prefill chunk. On the CPU: a block of widened weights. On a GPU, sparse: the selected
    columns of every head, gathered.
    """
    size = score_bytes(config, d.tokens) if d.sparse else 0
    if d.gpu and d.sparse:
        size += gather_bytes(config, d.dtype, d.tokens, d.sparse_columns)
    if d.kv_dtype == FP8:
        size += widened_bytes(config, d.dtype, d.tokens)
    if not d.gpu:
        size += linear_scratch_bytes(config, d.dtype, d.chunk)
    return size


def largest_context(
    config: ModelConfig,
    deployment: Deployment,
    available: int | None,
    host_available: int | None = None,
) -> int:
    """Most tokens of context, up to `deployment.tokens`, that fit into `available` bytes; or 0.

    Of the device and of the host; None: unknown, so it is enough.
    """
    low, high = 0, deployment.tokens  # bytes grow with the length
    while low < high:
        middle = (low + high + 1) // 2
        plan = memory_plan(config, replace(deployment, tokens=middle))
        fits = plan.fits(available, host_available)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def fit_context(
    config: ModelConfig,
    deployment: Deployment,
    wanted: int | None,
    available: int | None,
    host_available: int | None = None,
) -> int:
    """The context length that an engine reserves for.

    Args:
        config: the model.
        deployment: everything but the length (`tokens` is not read).
        wanted: tokens that the caller asks for; None: the model's maximum, or what fits into nine
            tenths of the available memory if that is less (a warning says so).
        available: bytes that may be taken; None: unknown, so nothing is refused.
        host_available: the same of the host, for what is page-locked there beside a GPU.

    Raises:
        ConfigError: `wanted` is beyond the model.
        MemoryBudgetError: `wanted` tokens do not fit, or not even two do.
    """
    limit = config.max_position_embeddings
    if wanted is not None and not 2 <= wanted <= limit:
        raise ConfigError(
            f"max_model_len: expected 2 to {limit} (max_position_embeddings), got {wanted}"
        )
    target = wanted or limit
    deployment = replace(deployment, tokens=target)
    plan = memory_plan(config, deployment)
    host = " of page-locked host memory"
    places = ("", plan.items, available), (host, plan.host, host_available)
    short = [
        (name, items, there)
        for name, items, there in places
        if there is not None and sum(items.values()) > there
    ]
    if not short:
        return target
    name, items, there = short[0]
    total = sum(items.values())
    if wanted is not None:
        listed = ", ".join(f"{item} {format_bytes(size)}" for item, size in items.items())
        raise MemoryBudgetError(
            f"max_model_len: {wanted} tokens need {total} bytes{name} ({format_bytes(total)}: "
            f"{listed}), but {there} bytes ({format_bytes(there)}) are available; "
            "`qwen1m plan` names what would make it fit"
        )
    most = [None if room is None else int(room * 0.9) for _, _, room in places]
    fitting = largest_context(config, deployment, *most)
    if fitting < 2:
        raise MemoryBudgetError(
            f"memory: not even a short context fits in {format_bytes(there)}{name}"
        )
    log.warning(
        "max_model_len is %d tokens, not the model's %d: %s%s are available and the full "
        "context needs %s",
        fitting, limit, format_bytes(there), name, format_bytes(total),
    )  # fmt: skip
    return fitting
