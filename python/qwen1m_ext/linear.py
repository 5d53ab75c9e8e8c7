"""Matrix products with weights: bf16, fp32 or fp8, on CPUs with and without a bf16 product.

On a CPU without AVX-512 torch's bf16 product reaches a fraction of its fp32 product, so weights and
rows are widened to fp32 a block at a time. Both accumulate in fp32 and round once: they differ in
the order of the sum only. bench/linear_cpu.py measures where that pays: at AVX2 from 8 rows on
(3.4 times as fast at 256 rows); with AVX-512 but without bf16 instructions it is a draw, and with
them torch's own product is far ahead, so both are left to torch.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from . import _host
from .fp8 import FP8, LARGEST, Fp8Matrix

Matrix = Tensor | Fp8Matrix
"""Weights of a linear layer, [out, in]."""

WIDEN_ROWS = 8
"""From this many rows on widening pays."""

BLOCK_BYTES = 4 << 20
"""Of a block of widened weights: it stays in the second or third cache."""

BLOCK_ROWS = 512
"""Rows that are widened at a time; enough to make widening the weights again a small part."""


@cache
def has_bf16_product() -> bool:
    """Whether torch's bf16 product is worth its name here. Other than x86: left to torch."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or _host.build_info()["cpu_isa_machine"] != "portable"


def project(out: Tensor, x: Tensor, weight: Matrix) -> None:
    """`out = x weight^T`, rounded once to x's dtype.

    Args:
        out: [rows, out_features], overwritten.
        x: [rows, in_features], bf16 or fp32.
        weight: [out_features, in_features], of x's dtype or fp8.
    """
    widen = x.dtype == torch.bfloat16 and len(x) >= WIDEN_ROWS and not has_bf16_product()
    if x.is_cuda and isinstance(weight, Fp8Matrix):
        out.copy_(scaled_product(x, weight))
    elif isinstance(weight, Tensor) and not (widen and x.device.type == "cpu"):
        torch.mm(x, weight.t(), out=out)
    else:
        dtype = torch.float32 if widen else x.dtype
        for rows in _blocks(len(x), BLOCK_ROWS if widen else len(x)):
            some = x[rows].to(dtype)
            for columns in _blocks(weight.shape[0], block_columns(weight.shape[1])):
                out[rows, columns] = some @ _widened(weight[columns], dtype).t()


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """`x weight^T (+ bias)` in a new tensor; the bias is added to the rounded product."""
    out = x.new_empty(len(x), weight.shape[0])
    project(out, x, weight)
    if bias is not None:
        out += bias
    return out


def scaled_product(x: Tensor, weight: Fp8Matrix) -> Tensor:
    """`x weight^T` in fp8 on tensor cores: x is quantised too, one scale per row.

    For GPUs from sm_89 on; the only product here that rounds its input.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    return torch._scaled_mm(
        (x.float() / scale).to(FP8),
        weight.data.t(),
        scale_a=scale,
        scale_b=weight.scale.t(),
        out_dtype=torch.bfloat16,
    )


def block_columns(in_features: int) -> int:
    """Weight rows of one widened block."""
    return max(64, BLOCK_BYTES // (4 * in_features))


def scratch_bytes(
    rows: int, shapes: Iterable[tuple[int, int]], dtype: torch.dtype, *, fp8: bool
) -> int:
    """Most bytes that `project` takes for a moment on the CPU, for weights of these shapes."""
    widen = dtype == torch.bfloat16 and rows >= WIDEN_ROWS and not has_bf16_product()
    if not fp8 and not widen:
        return 0
    size = 4 if widen else dtype.itemsize
    some = min(rows, BLOCK_ROWS) if widen else rows
    most = 0
    for out_features, in_features in shapes:
        columns = min(out_features, block_columns(in_features))
        block = columns * in_features * ((2 if fp8 else 0) + (size if size == 4 else 0))
        inputs = some * in_features * 4 if widen else 0
        most = max(most, block + inputs + some * columns * size)
    return most


def _widened(weight: Matrix, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantise(dtype)


def _blocks(total: int, size: int) -> Iterator[slice]:
    for begin in range(0, total, max(1, size)):
        yield slice(begin, min(total, begin + size))
