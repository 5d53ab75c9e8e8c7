"""Typed wrappers of `torch.ops.qwen1m`: the only module that touches them.

Each op writes into its first arguments and returns nothing. The contracts (shapes, dtypes,
rounding) stand in `include/qwen1m/<op>.h`; an argument that does not fit raises RuntimeError.
Importing this module loads the compiled library (`_C`) and touches no GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .errors import BackendError

PAGE_SIZE = 128
"""Tokens of a KV-cache page (kPageSize in include/qwen1m/dual_chunk.h)."""

INFINITE_CHUNK = 1 << 62
"""chunk_size of plain RoPE (kInfiniteChunk)."""

OP_NAMES = (
    "embedding", "rms_norm", "swiglu", "qkv_rope_append", "widen_pages", "prefill_attention",
    "decode_attention", "sample", "sparse_estimate", "sparse_plan", "sparse_prefill",
)  # fmt: skip

SPARSE_STAGES = 3
"""Lists of a plan per head: inter, successive, intra keys (kStages in sparse_plan.h)."""


def library_path() -> Path:
    """Where the compiled operators are: `QWEN1M_LIBRARY` if set, else beside this file."""
    override = os.environ.get("QWEN1M_LIBRARY")
    if override:
        return Path(override)
    return Path(__file__).resolve().parent / "_C.so"


def _load() -> None:
    path = library_path()
    if not path.is_file():
        raise BackendError(
            f"the compiled operators are missing: expected {path}; "
            "install the package with `pip install .` from its source folder"
        )
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    for name in OP_NAMES:  # the ops return nothing, so neither do their fakes
        torch.library.register_fake(f"qwen1m::{name}", lambda *args, **kwargs: None)


_load()
_ops = torch.ops.qwen1m


def cuda_kernels() -> dict[str, list[str]]:
    """The ops compiled for CUDA and their architectures: {"prefill_attention": ["sm_80", ...]}.

    A build fact; it asks no GPU.
    """
    from . import _host

    return dict(_host.build_info()["cuda_kernels"])


def supports_cuda() -> bool:
    """Whether every op was compiled with a CUDA kernel. Asks the build facts, not a GPU."""
    return set(OP_NAMES) <= set(cuda_kernels())


def embedding(out: Tensor, weight: Tensor, token_ids: Tensor) -> None:
    """`out = weight[token_ids]`; out: [tokens, hidden], weight: [vocab, hidden], ids int64.

    An id outside of the table is refused on the CPU; on a GPU its row becomes NaN.
    """
    _ops.embedding(out, weight, token_ids)


def rms_norm(out: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> None:
    """`residual += x; out = normalise(residual) * weight`, or of x without a residual.

    out, residual, x: [tokens, hidden]; weight: [hidden].
    """
    _ops.rms_norm(out, residual, x, weight, eps)


def swiglu(out: Tensor, gate_up: Tensor) -> None:
    """`out = silu(gate) * up`; out: [tokens, n], gate_up: [tokens, 2 n] (gate, then up)."""
    _ops.swiglu(out, gate_up)


def qkv_rope_append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    rope_table: Tensor,
    chunk_len: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Add the bias, write q un-rotated, rotate K at `position % chunk_len`, append K and V.

    q: [tokens, q_heads, D]; caches: [pages, kv_heads, 128, D]; qkv: [tokens, (q + 2 kv) D];
    positions, slot_mapping: [tokens] int64; rope_table: [rows, D/2, 2] float32.
    k_scale, v_scale: [kv_heads] float32 with caches in float8_e4m3fn: e4m3(key / k_scale).
    """
    _ops.qkv_rope_append(
        q, k_cache, v_cache, qkv, bias, positions, slot_mapping, rope_table, chunk_len,
        k_scale, v_scale,
    )  # fmt: skip


def widen_pages(wide: Tensor, codes: Tensor, scale: Tensor, pages: Tensor) -> None:
    """`wide[pages] = codes[pages] * scale` per KV head: an fp8 cache as prefill reads it.

    wide (bf16; fp32 on the CPU too), codes (float8_e4m3fn): [num_pages, kv_heads, 128, D]; scale:
    [kv_heads] float32; pages: int64, each once. A page outside of the cache is refused on the CPU;
    on a GPU it is not written.
    """
    _ops.widen_pages(wide, codes, scale, pages)


def prefill_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    logit_scale: Tensor,
    rope_table: Tensor,
    chunk_size: int,
    local_size: int,
) -> None:
    """Causal attention with Dual Chunk positions; q and out: [tokens, q_heads, D], un-rotated q.

    block_table: [batch, pages] int32; cu_q: [batch + 1] int64; kv_len: [batch] int64;
    logit_scale: [batch] float32; lse: [tokens, q_heads] float32, natural log.
    """
    _ops.prefill_attention(
        out, lse, q, k_cache, v_cache, block_table, cu_q, kv_len, logit_scale, rope_table,
        chunk_size, local_size,
    )  # fmt: skip


def decode_attention_scratch(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    chunk_size: int,
    local_size: int,
    num_sms: int | None = None,
) -> Tensor:
    """Scratch for `decode_attention` on the GPU of `q`, for calls of these shapes or smaller ones.

    Zeros, uint8. Calls leave it as they need it; two of them must not use it at the same time.
    num_sms: multiprocessors; default: those of q's GPU.
    """
    if num_sms is None:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    count = decode_attention_scratch_bytes(
        tuple(q.shape), k_cache.shape[1], block_table.shape[1], chunk_size, local_size, num_sms
    )
    return torch.zeros(count, dtype=torch.uint8, device=q.device)


def decode_attention_scratch_bytes(
    q_shape: tuple[int, ...],
    kv_heads: int,
    max_pages: int,
    chunk_size: int,
    local_size: int,
    num_sms: int,
) -> int:
    """Bytes of `decode_attention_scratch`; q_shape: [batch, q_tokens, q_heads, D]."""
    from . import _host

    batch, q_tokens, q_heads, head_dim = q_shape
    return _host.decode_attention_scratch_bytes(
        batch, q_tokens, q_heads, kv_heads, head_dim, max_pages * PAGE_SIZE,
        chunk_size, local_size, num_sms,
    )  # fmt: skip


def decode_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    kv_len: Tensor,
    logit_scale: Tensor,
    rope_table: Tensor,
    chunk_size: int,
    local_size: int,
    scratch: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attention of the newest tokens; q and out: [batch, q_tokens, q_heads, D], un-rotated q.

    The other arguments are those of `prefill_attention`, but logit_scale: [batch, q_tokens], one
    for each row; lse: [batch, q_tokens, q_heads].
    scratch: of `decode_attention_scratch`, for a GPU; made for this call if left out there.
    k_scale, v_scale: [kv_heads] float32 with caches in float8_e4m3fn: key = k_scale * e4m3.
    """
    if scratch is None and q.is_cuda:
        scratch = decode_attention_scratch(q, k_cache, block_table, chunk_size, local_size)
    _ops.decode_attention(
        out, lse, q, k_cache, v_cache, block_table, kv_len, logit_scale, rope_table,
        chunk_size, local_size, scratch, k_scale, v_scale,
    )  # fmt: skip


def sparse_estimate(
    vertical: Tensor,
    slash: Tensor,
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    logit_scale: Tensor,
    rope_table: Tensor,
    segment_end: int,
    chunk_size: int,
    local_size: int,
    critical: bool = True,
) -> None:
    """Column and diagonal sums of the attention of a segment's last rows.

    vertical, slash: [q_heads, segment_end] float32, by key and by offset i - j; q: [n, q_heads, D]
    un-rotated; block_table: [1, pages]; logit_scale: [1]. `critical`: continuous positions, which
    need rope_table rows up to chunk_size + chunk_len.
    """
    _ops.sparse_estimate(
        vertical, slash, q, k_cache, block_table, logit_scale, rope_table, segment_end,
        chunk_size, local_size, critical,
    )  # fmt: skip


def sparse_vertical_capacity(v_size: int, segment_end: int) -> int:
    """Columns of `verticals` that a plan with this largest budget may need (sparse_plan.h)."""
    return min(v_size, segment_end) + 15


def sparse_run_capacity(
    s_size: int, segment_end: int, tile_tokens: int, exact: bool = False
) -> int:
    """Entries of `runs` per head and stage that a plan with this largest budget may need."""
    apart = 2 if exact else tile_tokens + 1
    return max(min(s_size, -(-segment_end // apart)), 5)


def sparse_plan(
    verticals: Tensor,
    vertical_count: Tensor,
    runs: Tensor,
    run_count: Tensor,
    vertical_score: Tensor,
    slash_score: Tensor,
    v_size: Tensor,
    s_size: Tensor,
    segment_begin: int,
    chunk_size: int,
    local_size: int,
    tile_tokens: int,
    group: int = 1,
    exact: bool = False,
    fallback: bool = False,
) -> None:
    """The best columns and diagonals of each head, as the lists that `sparse_prefill` takes.

    verticals: [q_heads, capacity], runs: [q_heads, 3, capacity, 2], counts: [q_heads, 3], all
    int32; scores: [q_heads, segment_end] of `sparse_estimate`; v_size, s_size: [q_heads] int64.
    """
    _ops.sparse_plan(
        verticals, vertical_count, runs, run_count, vertical_score, slash_score, v_size, s_size,
        segment_begin, chunk_size, local_size, tile_tokens, group, exact, fallback,
    )  # fmt: skip


def sparse_prefill(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    logit_scale: Tensor,
    rope_table: Tensor,
    verticals: Tensor,
    vertical_count: Tensor,
    runs: Tensor,
    run_count: Tensor,
    scratch: Tensor | None,
    q_begin: int,
    segment_begin: int,
    segment_end: int,
    chunk_size: int,
    local_size: int,
    tile_tokens: int,
    exact: bool = False,
) -> None:
    """`prefill_attention` of one segment's rows from q_begin on, over the keys of a plan.

    q and out: [tokens, q_heads, D]; lse: [tokens, q_heads]; block_table: [1, pages]; logit_scale:
    [1]; the lists are those of `sparse_plan`; scratch (GPU only, written): [2, q_heads, capacity of
    verticals + 1, D].
    """
    _ops.sparse_prefill(
        out, lse, q, k_cache, v_cache, block_table, logit_scale, rope_table, verticals,
        vertical_count, runs, run_count, scratch, q_begin, segment_begin, segment_end, chunk_size,
        local_size, tile_tokens, exact,
    )  # fmt: skip


def sample(
    token_ids: Tensor,
    logprobs: Tensor | None,
    history: Tensor | None,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    penalties: Tensor | None,
    seed: Tensor,
    position: Tensor,
) -> None:
    """The next token of each row of logits [batch, vocab], in one launch, and its log probability.

    Penalties, temperature (0: greedy), min_p, top_k, top_p and a draw that is a function of
    (seed, position). token_ids [batch] int64 and logprobs [batch] float32 are written; history
    [batch, vocab] int32 holds 2 * (times in the output) + (1 if in the prompt) and is kept up;
    penalties [batch, 3]: repetition, presence, frequency. One entry per row of the others:
    temperature, top_p, min_p float32; top_k (<= 0: all), seed, position int64. A row with a NaN
    gives -1. The steps are those of `sampler.Sampler`, whose random stream is another one.
    """
    _ops.sample(
        token_ids, logprobs, history, logits, temperature, top_k, top_p, min_p, penalties, seed,
        position,
    )  # fmt: skip
