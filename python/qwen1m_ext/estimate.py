"""How long a prefill and a decode step take on a machine: the work, divided by stated rates.

Two answers are given. The floor divides by what the machine reaches in a plain matrix product and
a plain copy: no kernel is faster. The estimate divides attention by what the best public kernel
was measured to reach. Neither is a measurement of this package.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import ops
from .attention import build_rope_table
from .config import ModelConfig
from .fp8 import FP8
from .plan import Deployment
from .weights import expected_shapes, is_linear

MATMUL_SHARE = 790 / 989
"""bf16 matrix products on random data: share of the datasheet's rate. H200, 790 TFLOP/s."""

COPY_SHARE = 4.3 / 4.8
"""A plain copy: share of the datasheet's bandwidth. H200, 4.3 TB/s."""

FP8_SHARE = 1450 / 1979
"""fp8 matrix products: share of the datasheet's rate. H800, DeepGEMM's README (1,450 to 1,550)."""

DENSE_ATTENTION_SHARE = 688 / 790
"""Causal attention, share of a matrix product: cuDNN 9.19 on H200 at 32k, 688 TFLOP/s
(NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training/results/h200_919_only_cudnn)."""

SPARSE_ATTENTION_SHARE = 315 / 790
"""Block-sparse attention on selected pairs: FlashInfer PR 5326 on H200, 315 to 317 TFLOP/s."""

FP8_DECODE_SHARE = 2.30 / 4.3
"""Decode attention over an fp8 cache, share of a copy: TileOps PR 2132 on H200 at 256k, 2.30 TB/s.
Over a bf16 cache it is as fast as a copy: FlashMLA on H800, 3.0 of the datasheet's 3.35 TB/s."""

SPARSE_COLUMNS = 18_000
"""Columns that a row of vertical-slash attention computes, mean over the heads. It follows from the
speed-up over dense at a million tokens that the Qwen2.5-1M report states (27.8x); `--columns`
overrides it, since it depends on the text."""


PCIE = {4: 26.3e9, 5: 56.7e9}
"""Bytes/s from host memory to a card over 16 lanes of each generation, as nvbandwidth's
host_to_device_memcpy_ce was reported to measure: 26.3 GB/s (RTX 4090, NVIDIA/nvbandwidth issue 15)
and 56.7 to 57.1 GB/s (H100, issue 6; one of its four cards reached 14.2). The lanes carry 32 and
64 GB/s."""


@dataclass(frozen=True)
class Machine:
    """A device: its memory and its ceilings."""

    name: str
    memory: int  # bytes that a process may take
    matmul: float  # FLOP/s of bf16 matrix products
    fp8_matmul: float | None  # FLOP/s; None: fp8 weights are widened first
    bandwidth: float  # bytes/s of a copy
    link: float  # bytes/s from host memory
    source: str
    dense_share: float = DENSE_ATTENTION_SHARE
    sparse_share: float = SPARSE_ATTENTION_SHARE
    gpu: bool = True


def _card(
    name: str, mib: int, tflops: float, fp8: float | None, terabytes: float, pcie: int
) -> Machine:
    """From the datasheet (dense TFLOP/s, TB/s) and the shares above; memory as nvidia-smi says."""
    return Machine(
        name,
        mib << 20,
        tflops * 1e12 * MATMUL_SHARE,
        fp8 * 1e12 * FP8_SHARE if fp8 else None,
        terabytes * 1e12 * COPY_SHARE,
        PCIE[pcie],
        "datasheet rates, times the shares that an H200 (fp8: an H800) was measured to reach",
    )


# Cards that the package compiles kernels for (sm_90a, and sm_80 code on sm_80 to sm_89).
CARDS = {
    card.name: card
    for card in (
        _card("h200", 143_771, 989, 1979, 4.8, 5),
        _card("h100", 81_559, 989, 1979, 3.35, 5),
        _card("h20", 97_871, 148, 296, 4.0, 5),
        _card("a100", 81_920, 312, None, 2.039, 4),
        _card("a100-40g", 40_960, 312, None, 1.555, 4),
        _card("l40s", 46_068, 362, 733, 0.864, 4),
        _card("rtx4090", 24_564, 165, 330, 1.008, 4),
    )
}


@dataclass(frozen=True)
class Seconds:
    """Time of a prefill by part, and of one decode step."""

    linear: float
    attention: float
    elementwise: float  # norms, rotation, cache write, SwiGLU: their bytes
    decode_step: float
    link: float = 0.0  # of a prefill: copies of an offloaded cache that no computation hides

    @property
    def prefill(self) -> float:
        """To the first token."""
        return self.linear + self.attention + self.elementwise + self.link


def linear_params(config: ModelConfig) -> int:
    """Weights of all linear layers, without embedding and head."""
    return sum(math.prod(s) for name, s in expected_shapes(config).items() if is_linear(name))


def attention_pairs(tokens: int, columns: int | None) -> float:
    """(query, key) pairs per head of a causal prefill in which a row meets `columns` keys."""
    c = tokens if columns is None else min(columns, tokens)
    return c * tokens - c * (c - 1) / 2


def elementwise_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the unfused ops between the matrix products read and write."""
    norms = 2 * 4 * config.hidden_size  # x, residual in and out, result
    append = 2 * (config.q_size + 2 * config.kv_size)  # one un-rotated q, and the cache
    swiglu = 3 * config.intermediate_size
    return config.num_layers * (norms + append + swiglu) * dtype.itemsize


def decode_bytes(config: ModelConfig, d: Deployment) -> tuple[int, int]:
    """Bytes that one decode step reads: (linear layers and head, the whole cache)."""
    head = config.vocab_size * config.hidden_size * d.dtype.itemsize
    linear = linear_params(config) * (1 if config.quantised else d.dtype.itemsize)
    return linear + head, d.tokens * config.kv_bytes_per_token(d.kv_dtype)


@dataclass(frozen=True)
class LinkBytes:
    """What an offloaded cache moves between host and device."""

    loaded: float  # by a prefill
    stored: float  # by a prefill
    step: float  # loaded by a decode step


def link_bytes(config: ModelConfig, d: Deployment) -> LinkBytes:
    """Each chunk of a prefill loads all tokens before it and stores its own.

    A decode step loads the whole context, beside which the page that it stores is nothing.
    """
    share = len(d.streamed_layers(config)) / config.num_layers
    per_token = config.kv_bytes_per_token(d.kv_dtype) * share
    chunks = -(-d.tokens // d.chunk)
    loaded = d.chunk * chunks * (chunks - 1) / 2
    return LinkBytes(loaded * per_token, d.tokens * per_token, d.tokens * per_token)


def _with_link(config: ModelConfig, d: Deployment, link: float, s: Seconds) -> Seconds:
    """Copies run beside the computation: what ends last counts.

    A GPU moves bytes in and out at the same time, and loads the first layers of a decode step while
    the step before it ends. A CPU has one thread for both, and its computation waits for the first
    layer of each step, if that is away.
    """
    moved = link_bytes(config, d)
    decode, first = moved.step / link, 0.0
    prefill = max(moved.loaded, moved.stored) / link
    if not d.gpu:
        prefill = (moved.loaded + moved.stored) / link
        away = d.streamed_layers(config)
        first = decode / len(away) if away[:1] == [0] else 0.0
    step = max(s.decode_step + first, decode)
    return replace(s, link=max(0.0, prefill - s.prefill), decode_step=step)


def estimate(
    config: ModelConfig, d: Deployment, machine: Machine, columns: int = SPARSE_COLUMNS
) -> tuple[Seconds, Seconds]:
    """(floor, estimate) of a prompt of `d.tokens` tokens, and of a decode step after it."""
    fp8 = machine.fp8_matmul if config.quantised else None
    linear = 2 * d.tokens * linear_params(config) / (fp8 or machine.matmul)
    pairs = attention_pairs(d.tokens, columns if d.sparse else None)
    attention = 4 * config.num_layers * config.q_size * pairs / machine.matmul
    elementwise = d.tokens * elementwise_bytes_per_token(config, d.dtype) / machine.bandwidth
    weights, cache = (size / machine.bandwidth for size in decode_bytes(config, d))
    share = machine.sparse_share if d.sparse else machine.dense_share
    read_share = FP8_DECODE_SHARE if machine.gpu and d.kv_dtype == FP8 else 1.0
    floor = Seconds(linear, attention, elementwise, weights + cache)
    expected = Seconds(linear, attention / share, elementwise, weights + cache / read_share)
    return (
        _with_link(config, d, machine.link, floor),
        _with_link(config, d, machine.link, expected),
    )


def measure_cpu(config: ModelConfig, dtype: torch.dtype, memory: int) -> Machine:
    """This machine: a matrix product, an attention and a sum over bytes, timed for a second."""
    x, w = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    matmul = 2 * 512 * 2048 * 2048 / _fastest(lambda: torch.mm(x, w.t()))
    stored = torch.zeros(1 << 24)
    bandwidth = stored.nbytes / _fastest(stored.sum)
    tokens = 1024
    q, kv = config.num_q_heads, config.num_kv_heads
    pages = tokens // ops.PAGE_SIZE
    k_cache = torch.randn(pages, kv, ops.PAGE_SIZE, config.head_dim).to(dtype)
    queries = torch.randn(tokens, q, config.head_dim).to(dtype)
    out = torch.empty_like(queries)
    table = build_rope_table(config.rope_theta, config.head_dim, tokens)
    block_table = torch.arange(pages, dtype=torch.int32)[None]
    seconds = _fastest(
        lambda: ops.prefill_attention(
            out, None, queries, k_cache, k_cache, block_table, torch.tensor([0, tokens]),
            torch.tensor([tokens]), torch.tensor([config.head_dim**-0.5]), table,
            ops.INFINITE_CHUNK, 0,
        )
    )  # fmt: skip
    share = 4 * config.q_size * attention_pairs(tokens, None) / seconds / matmul
    source = "measured just now on this machine: a matrix product, attention at 1,024 tokens, a sum"
    link = bandwidth / 2  # a copy within one memory reads and writes
    return Machine("cpu", memory, matmul, None, bandwidth, link, source, share, share, gpu=False)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    call()
    best, end = math.inf, time.perf_counter() + 0.25
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
