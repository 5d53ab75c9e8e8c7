"""Small, good arguments of every op, in schema order: the start of all negative tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lib.cases import PAGE_SIZE, THETA
from lib.emulator import torch_device
from lib.generator import tensor
from qwen1m_ext import ops
from reference.rope import rope_table


def _embedding() -> dict[str, Any]:
    """3 tokens of 8 ids, 32 wide."""
    return dict(out=torch.zeros(3, 32), weight=tensor(1, 8, 32), token_ids=torch.tensor([7, 0, 3]))


def _rms_norm() -> dict[str, Any]:
    """4 tokens of 32."""
    return dict(
        out=torch.zeros(4, 32),
        residual=tensor(1, 4, 32),
        x=tensor(2, 4, 32),
        weight=tensor(3, 32),
        eps=1e-6,
    )


def _swiglu() -> dict[str, Any]:
    """4 tokens, 16 gates."""
    return dict(out=torch.zeros(4, 16), gate_up=tensor(1, 4, 32))


def _qkv_rope_append() -> dict[str, Any]:
    """3 tokens, 2 query heads, 1 KV head, D = 16, 2 pages, 40 table rows."""
    return dict(
        q=torch.zeros(3, 2, 16),
        k_cache=torch.zeros(2, 1, PAGE_SIZE, 16),
        v_cache=torch.zeros(2, 1, PAGE_SIZE, 16),
        qkv=tensor(1, 3, 64),
        bias=tensor(2, 64),
        positions=torch.tensor([37, 38, 39]),
        slot_mapping=torch.tensor([254, 255, 0]),
        rope_table=rope_table(THETA, 16, 40).float(),
        chunk_len=40,
        k_scale=None,
        v_scale=None,
    )


def _widen_pages() -> dict[str, Any]:
    """Pages 3 and 1 of 4, 2 KV heads, D = 16."""
    return dict(
        wide=torch.zeros(4, 2, PAGE_SIZE, 16),
        codes=tensor(1, 4, 2, PAGE_SIZE, 16).to(torch.float8_e4m3fn),
        scale=torch.tensor([0.25, 2.0]),
        pages=torch.tensor([3, 1]),
    )


def _attention() -> dict[str, Any]:
    """What both attentions take: 2 sequences of 130 and 7 tokens in 4 pages, chunks of 40."""
    return dict(
        k_cache=tensor(2, 4, 1, PAGE_SIZE, 16),
        v_cache=tensor(3, 4, 1, PAGE_SIZE, 16),
        block_table=torch.tensor([[3, 1], [0, 2]], dtype=torch.int32),
        kv_len=torch.tensor([130, 7]),
        logit_scale=torch.tensor([0.25, 0.3]),
        rope_table=rope_table(THETA, 16, 49).float(),
        chunk_size=48,
        local_size=8,
    )


def _prefill_attention() -> dict[str, Any]:
    """5 rows, 2 query heads, 1 KV head, D = 16."""
    shared = _attention()
    return dict(
        out=torch.zeros(5, 2, 16),
        lse=torch.zeros(5, 2),
        q=tensor(1, 5, 2, 16),
        k_cache=shared.pop("k_cache"),
        v_cache=shared.pop("v_cache"),
        block_table=shared.pop("block_table"),
        cu_q=torch.tensor([0, 2, 5]),
        **shared,
    )


def _decode_attention() -> dict[str, Any]:
    """2 tokens of each sequence, 2 query heads, 1 KV head, D = 16."""
    return dict(
        out=torch.zeros(2, 2, 2, 16),
        lse=torch.zeros(2, 2, 2),
        q=tensor(1, 2, 2, 2, 16),
        **(_attention() | dict(logit_scale=torch.tensor([[0.25, 0.28], [0.3, 0.2]]))),
        scratch=None,
        k_scale=None,
        v_scale=None,
    )


def _sample() -> dict[str, Any]:
    """3 rows of 24 tokens, one greedy."""
    return dict(
        token_ids=torch.zeros(3, dtype=torch.int64),
        logprobs=torch.zeros(3),
        history=torch.arange(72, dtype=torch.int32).view(3, 24) % 4,
        logits=2 * tensor(1, 3, 24),
        temperature=torch.tensor([1.0, 0.0, 0.7]),
        top_k=torch.tensor([0, 5, 3]),
        top_p=torch.tensor([1.0, 0.5, 0.8]),
        min_p=torch.tensor([0.0, 0.1, 0.05]),
        penalties=torch.tensor([[1.0, 0.0, 0.0], [1.1, 0.2, 0.3], [1.5, 0.0, 0.1]]),
        seed=torch.tensor([1, 2, 3]),
        position=torch.tensor([10, 20, 30]),
    )


def _one_sequence() -> dict[str, Any]:
    """130 tokens of D = 16 in 2 pages, chunks of 40: tokens 120 to 129 lie in chunk 3."""
    return dict(
        k_cache=tensor(2, 2, 1, PAGE_SIZE, 16),
        v_cache=tensor(3, 2, 1, PAGE_SIZE, 16),
        block_table=torch.tensor([[1, 0]], dtype=torch.int32),
        logit_scale=torch.tensor([0.25]),
        rope_table=rope_table(THETA, 16, 88).float(),
    )


_CHUNKS = dict(chunk_size=48, local_size=8)


def _sparse_estimate() -> dict[str, Any]:
    """The last 5 tokens, 2 query heads."""
    shared = _one_sequence()
    del shared["v_cache"]
    return dict(
        vertical=torch.zeros(2, 130),
        slash=torch.zeros(2, 130),
        q=tensor(1, 5, 2, 16),
        **shared,
        segment_end=130,
        **_CHUNKS,
        critical=True,
    )


def _sparse_plan() -> dict[str, Any]:
    """The segment from token 120 to 129, tiles of 64, budgets of 5 and 6."""
    return dict(
        verticals=torch.zeros(2, 20, dtype=torch.int32),
        vertical_count=torch.zeros(2, 3, dtype=torch.int32),
        runs=torch.zeros(2, 3, 5, 2, dtype=torch.int32),
        run_count=torch.zeros(2, 3, dtype=torch.int32),
        vertical_score=tensor(4, 2, 130),
        slash_score=tensor(5, 2, 130),
        v_size=torch.tensor([5, 5]),
        s_size=torch.tensor([6, 6]),
        segment_begin=120,
        **_CHUNKS,
        tile_tokens=64,
        group=1,
        exact=False,
        fallback=False,
    )


def _sparse_prefill() -> dict[str, Any]:
    """Tokens 125 to 129 of the segment from token 120, two heads."""
    runs = torch.full((2, 3, 2, 2), -7, dtype=torch.int32)
    runs[:, 2, 0] = torch.tensor([0, 3])
    runs[:, 0] = torch.tensor([[40, 60], [124, 125]])
    return dict(
        out=torch.zeros(5, 2, 16),
        lse=torch.zeros(5, 2),
        q=tensor(1, 5, 2, 16),
        **_one_sequence(),
        verticals=torch.tensor([[2, 50, 121], [7, 79, 120]], dtype=torch.int32),
        vertical_count=torch.tensor([[2, 0, 1], [2, 0, 1]], dtype=torch.int32),
        runs=runs,
        run_count=torch.tensor([[2, 0, 1], [2, 0, 1]], dtype=torch.int32),
        scratch=None,
        q_begin=125,
        segment_begin=120,
        segment_end=130,
        **_CHUNKS,
        tile_tokens=64,
        exact=False,
    )


def _for_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention with D = 64 in bf16, which the GPU kernels take."""
    names = [name for name in ("q", "k_cache", "v_cache") if name in arguments]
    shapes = {name: (*arguments[name].shape[:-1], 64) for name in names}
    wide = {name: tensor(seed, *shapes[name]).bfloat16() for seed, name in enumerate(names, 1)}
    if "out" in arguments:
        wide["out"] = torch.zeros_like(wide["q"])
    if "verticals" in arguments:
        heads, capacity = arguments["verticals"].shape
        wide["scratch"] = torch.zeros(2, heads, capacity + 1, 64).bfloat16()
    table = rope_table(THETA, 64, len(arguments["rope_table"])).float()
    return arguments | wide | dict(rope_table=table)


_ALL = {
    "sample": _sample,
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "qkv_rope_append": _qkv_rope_append,
    "prefill_attention": _prefill_attention,
    "decode_attention": _decode_attention,
    "sparse_estimate": _sparse_estimate,
    "sparse_plan": _sparse_plan,
    "sparse_prefill": _sparse_prefill,
    "widen_pages": _widen_pages,
}


_ATTENTION = ("prefill_attention", "decode_attention", "sparse_estimate", "sparse_prefill")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def good_arguments(op: str, device: str = "cpu") -> dict[str, Any]:
    """Fresh keyword arguments of an op, finite and within every rule (of its kernels there)."""
    on_gpu = device.startswith(("emu", "cuda"))
    arguments = _ALL[op]()
    if on_gpu and op in _ATTENTION:
        arguments = _for_gpu(arguments)
    if on_gpu and op in ("rms_norm", "swiglu", "qkv_rope_append"):
        arguments = {
            name: value.bfloat16() if _is_float(value) and name != "rope_table" else value
            for name, value in arguments.items()
        }
    if on_gpu and op == "widen_pages":
        arguments["wide"] = arguments["wide"].bfloat16()
    where = torch_device(device)
    arguments = {
        name: value.to(where) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if op == "decode_attention" and device.startswith("cuda"):
        names = ("q", "k_cache", "block_table", "chunk_size", "local_size")
        arguments["scratch"] = ops.decode_attention_scratch(*(arguments[name] for name in names))
    return arguments
