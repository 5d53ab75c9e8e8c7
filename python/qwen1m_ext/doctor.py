"""`qwen1m doctor`: what this installation is and whether it computes correctly; paste-ready."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _host, ops
from .attention import build_rope_table
from .choices import missing_gpu
from .machine import cpu_name
from .memory import available_bytes, format_bytes

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest absolute error of the self-test's attention outputs, whose values are of order 1."""

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "transformers")


def facts() -> Iterator[tuple[str, str]]:
    """Versions, machine, build and operators, as (name, text)."""
    build = _host.build_info()
    version = build["version"] + (f" ({build['git']})" if build["git"] else "")
    yield "qwen1m_ext", f"{version}, {build['build_type']} build by {build['compiler']}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield (
        "torch ABI",
        f"built with {build['torch_headers']}, needs {build['torch_target']} or newer",
    )
    yield "cpu", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    compiled = ", ".join(build["cpu_isas_compiled"])
    yield "cpu kernels", f"{build['cpu_isa']} (compiled: {compiled})"
    available = available_bytes()
    yield "memory", f"{format_bytes(available)} available" if available else "unknown"
    yield "gpu", _gpu()
    if build["cuda"]:
        lacking = "" if ops.supports_cuda() else "; some ops have none"
        yield "cuda kernels", f"compiled by nvcc {build['cuda_compiler']}{lacking}"
    else:
        yield "cuda kernels", "not compiled: this build found no nvcc"
    missing = missing_gpu()
    yield "models run on", f"the CPU: {missing}" if missing else "the GPU (bfloat16), or the CPU"
    for name in ops.OP_NAMES:
        # The CUDA key is registered in any case, as an error where there is no kernel.
        cpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"qwen1m::{name}", "CPU")
        architectures = ops.cuda_kernels().get(name)
        cuda = [f"CUDA ({', '.join(architectures)})"] if architectures else []
        yield f"op {name}", ", ".join([*(["CPU"] if cpu else []), *cuda]) or "MISSING"


def self_test() -> Iterator[tuple[str, float, float]]:
    """Attention across 0, 1 and 2 Dual Chunk borders against a float64 definition.

    Yields (what, largest absolute error, tolerance).
    """
    kinds = [("cpu", dtype) for dtype in TOLERANCE]
    if missing_gpu() is None:
        kinds.append(("cuda", torch.bfloat16))
    for where, dtype in kinds:
        name, tolerance = str(dtype).removeprefix("torch."), TOLERANCE[dtype]
        name += " on cuda" if where == "cuda" else ""
        for borders, tokens in (
            ("0 DCA borders", 90),
            ("1 DCA border", 180),
            ("2 DCA borders", 290),
        ):
            prefill, decode = _attention_errors(dtype, tokens, torch.device(where))
            yield f"prefill_attention {name}, {borders}", prefill, tolerance
            yield f"decode_attention {name}, {borders}", decode, tolerance


def run_doctor() -> int:
    """Print the report; returns 0 if everything is in order, else 1."""
    print("### qwen1m doctor")
    for name, text in facts():
        print(f"- {name}: {text}")
    print("#### self-test")
    failed = 0
    for what, error, tolerance in self_test():
        good = error <= tolerance  # a NaN is not good
        failed += not good
        verdict = "ok" if good else "FAILED"
        print(f"- {verdict}: {what}: largest error {error:.1e} (tolerance {tolerance:.0e})")
    print(f"#### {'everything is in order' if not failed else f'{failed} checks FAILED'}")
    sys.stdout.flush()
    return 1 if failed else 0


def _attention_errors(dtype: torch.dtype, tokens: int, where: torch.device) -> tuple[float, float]:
    """Largest errors of prefill and decode: 4/2 heads x 64, chunks of 112 tokens."""
    chunk_size, local_size, heads, kv_heads, dim = 128, 16, 4, 2, 64
    chunk_len = chunk_size - local_size
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
    table = build_rope_table(1e4, dim, chunk_size + 1)
    pages = -(-tokens // ops.PAGE_SIZE)
    block_table = torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None]  # not in order
    positions = torch.arange(tokens)
    slots = block_table[0, positions // 128].long() * 128 + positions % 128
    k_cache = torch.zeros(pages, kv_heads, ops.PAGE_SIZE, dim, dtype=dtype, device=where)
    v_cache = torch.zeros_like(k_cache)
    q = torch.empty(tokens, heads, dim, dtype=dtype, device=where)
    rope, block_table = table.to(where), block_table.to(where)
    ops.qkv_rope_append(
        q, k_cache, v_cache, qkv.to(where), None, positions.to(where), slots.to(where), rope,
        chunk_len,
    )  # fmt: skip
    kv_len = torch.tensor([tokens], device=where)
    scale = torch.tensor([dim**-0.5], device=where)
    out = torch.empty_like(q)
    cu_q = torch.tensor([0, tokens], device=where)
    ops.prefill_attention(
        out, None, q, k_cache, v_cache, block_table, cu_q, kv_len, scale, rope,
        chunk_size, local_size,
    )  # fmt: skip
    last = torch.empty(1, 1, heads, dim, dtype=dtype, device=where)
    ops.decode_attention(
        last, None, q[None, -1:], k_cache, v_cache, block_table, kv_len, scale[None], rope,
        chunk_size, local_size,
    )  # fmt: skip
    want = _definition(qkv, table, heads, kv_heads, chunk_size, local_size)
    return (
        float((out.cpu().double() - want).abs().max()),
        float((last[0].cpu().double() - want[-1:]).abs().max()),
    )


def _definition(
    qkv: Tensor, table: Tensor, heads: int, kv_heads: int, chunk_size: int, local_size: int
) -> Tensor:
    """Dual Chunk Attention in float64, pair by pair, with one global softmax."""
    tokens, chunk_len = len(qkv), chunk_size - local_size
    x = qkv.double().view(tokens, heads + 2 * kv_heads, -1)
    dim = x.shape[-1]
    group = heads // kv_heads
    k = x[:, heads : heads + kv_heads].repeat_interleave(group, 1)
    v = x[:, heads + kv_heads :].repeat_interleave(group, 1)

    def rotate(values: Tensor, rows: Tensor) -> Tensor:
        cos, sin = table.double()[rows].unbind(-1)
        a, b = values[..., : dim // 2], values[..., dim // 2 :]
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    token = torch.arange(tokens)
    offset, chunk = token % chunk_len, token // chunk_len
    k = rotate(k, offset)
    inter = torch.full_like(offset, min(2 * chunk_len - 1, chunk_size))
    positions = (offset, (offset + chunk_len).clamp(max=chunk_size), inter)
    intra, succ, far = (torch.einsum("qhd,khd->hqk", rotate(x[:, :heads], p), k) for p in positions)
    apart = chunk[:, None] - chunk
    logits = torch.where(apart == 0, intra, torch.where(apart == 1, succ, far)) * dim**-0.5
    logits = logits.masked_fill(token > token[:, None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible to torch"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)
