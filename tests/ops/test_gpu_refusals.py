"""What the GPU kernels demand beyond an op's contract: refused, by every launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.emulator import operator
from lib.refuse import refuses


def shifted(t: Tensor) -> Tensor:
    """The same values, one element off the alignment."""
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


def padded(t: Tensor) -> Tensor:
    """The same values with rows one element farther apart."""
    return torch.cat((t, t[:, :1]), dim=1)[:, :-1]


def narrow(width: int) -> Callable[[Tensor], Tensor]:
    """The first columns."""
    return lambda t: t[..., :width].contiguous()


@pytest.mark.parametrize(
    ("op", "change", "text"),
    [
        ("rms_norm", dict(x=shifted), ("x", "16 bytes", "2")),
        ("rms_norm", dict(residual=padded), ("residual", "multiple of 8", "33")),
        ("rms_norm", dict(out=lambda t: t[:, :28], x=lambda t: t[:, :28], weight=narrow(28),
                          residual=lambda t: t[:, :28]), ("hidden", "multiple of 8", "28")),
        ("swiglu", dict(out=shifted), ("out", "16 bytes", "2")),
        ("swiglu", dict(gate_up=padded), ("gate_up", "multiple of 8", "33")),
        ("swiglu", dict(out=narrow(12), gate_up=narrow(24)), ("multiple of 8", "12")),
        ("embedding", dict(weight=shifted), ("weight", "16 bytes", "4")),
        ("embedding", dict(out=padded), ("out", "multiple of 4", "33")),
        ("embedding", dict(out=lambda t: t[:, :30], weight=lambda t: t[:, :30]),
         ("16 bytes", "120")),
        ("qkv_rope_append", dict(k_cache=shifted), ("k_cache", "16 bytes", "2")),
        ("qkv_rope_append", dict(qkv=padded), ("qkv", "multiple of 8", "65")),
        ("qkv_rope_append", dict(rope_table=shifted), ("rope_table", "16 bytes", "4")),
        ("qkv_rope_append",
         dict(q=narrow(8), k_cache=narrow(8), v_cache=narrow(8), qkv=narrow(32), bias=narrow(32),
              rope_table=lambda t: t[:, :4].contiguous()), ("head_dim", "multiple of 16", "8")),
        ("widen_pages", dict(wide=shifted), ("wide", "16 bytes", "2")),
        ("widen_pages", dict(codes=shifted), ("codes", "16 bytes", "1")),
        ("widen_pages", dict(wide=lambda t: t.float()), ("wide", "bfloat16", "float32")),
        ("widen_pages", dict(wide=narrow(12), codes=narrow(12)), ("multiple of 8", "12")),
        ("sample", dict(logits=padded), ("logits", "multiple of 4", "25")),
        ("sample", dict(history=shifted), ("history", "16 bytes", "4")),
        ("decode_attention", dict(q=shifted), ("q", "16 bytes", "2")),
        ("decode_attention", dict(out=lambda t: t.float(), q=lambda t: t.float(),
                                  k_cache=lambda t: t.float(), v_cache=lambda t: t.float()),
         ("q", "bfloat16", "float32")),
        ("decode_attention", dict(scratch=lambda _: torch.zeros(70000, dtype=torch.uint8)),
         ("scratch", "bytes", "70000")),
        ("rms_norm", dict(eps=lambda _: 0.0), ("eps", "> 0", "0")),
        ("swiglu", dict(out=lambda t: t[:3]), ("gate_up", "tokens=3", "[4, 32]")),
        ("qkv_rope_append", dict(chunk_len=lambda _: 0), ("chunk_len", "> 0", "0")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_layout(op: str, change: dict[str, Any], text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    if device == "cpu":
        pytest.skip("cpu: has no such demands")
    arguments = good_arguments(op, device)
    refuses(operator(op, device), arguments, change, (op, *text))


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "qkv_rope_append"])
def test_float32(op: str, device: str) -> None:
    """These kernels have bf16 only, and say so."""
    if device == "cpu":
        pytest.skip("cpu: has float32")
    arguments = good_arguments(op, device)
    change = {
        name: (lambda t: t.float())
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16
    }
    refuses(operator(op, device), arguments, change, (op, "bfloat16", "float32"))
