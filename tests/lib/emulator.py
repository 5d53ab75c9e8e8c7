"""GPU kernels under the emulator, called with torch tensors of the host (ctypes).

The library is built with the C++ tests (tests/emu/CMakeLists.txt).
"""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lib.capture import Recorder
from qwen1m_ext import ops

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"emu_sm90": 90, "emu_sm80": 80}
"""Device names of the tests, `--device=emu` being both, and the kernels they stand for."""
OPS = {
    "decode_attention": ["emu_sm90", "emu_sm80"],
    "embedding": ["emu_sm80"],
    "prefill_attention": ["emu_sm90", "emu_sm80"],
    "qkv_rope_append": ["emu_sm80"],
    "rms_norm": ["emu_sm80"],
    "sample": ["emu_sm90", "emu_sm80"],
    "sparse_estimate": ["emu_sm80"],
    "sparse_plan": ["emu_sm80"],
    "sparse_prefill": ["emu_sm90", "emu_sm80"],
    "swiglu": ["emu_sm80"],
    "widen_pages": ["emu_sm80"],
}
"""Operators with kernels that can be emulated; an sm_80 kernel alone serves sm_90 too."""
EMULATED_SMS = 6
"""Multiprocessors of the emulated machine (kEmulatedSms in decode_attention_emu.cpp)."""
COUNTER_BYTES = 64 * 1024
"""Of decode_attention's scratch (kCounterBytes in decode_attention_grid.h)."""


def torch_device(device: str) -> str:
    """Where the tensors of a test device lie: emulated kernels work on those of the host."""
    return "cpu" if device in ARCHITECTURES else device


def operator(name: str, device: str) -> Callable[..., None]:
    """ops.<name>, or its emulated kernel."""
    if device not in ARCHITECTURES:
        return getattr(ops, name)
    assert name in OPS
    return partial(_decode_attention if name == "decode_attention" else _call, name, device)


class _Tensor(ctypes.Structure):
    """EmulatedTensor of csrc/common/emulated_call.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("storage", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Tensor:
        """A view of a tensor; a null one for None."""
        if tensor is None:
            return cls()
        pad = [0] * (4 - tensor.dim())
        storage = tensor.untyped_storage()
        return cls(
            tensor.data_ptr(),
            {torch.float32: 1, torch.float8_e4m3fn: 2}.get(tensor.dtype, 0),
            (ctypes.c_int64 * 4)(*tensor.shape, *pad),
            (ctypes.c_int64 * 4)(*tensor.stride(), *pad),
            storage.data_ptr(),
            storage.nbytes(),
        )


class _Call(ctypes.Structure):
    """EmulatedCall of csrc/common/emulated_call.h."""

    _fields_ = (
        ("architecture", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("text", ctypes.c_char_p),
        ("text_bytes", ctypes.c_int64),
    )


def library_path() -> Path | None:
    """The built library: QWEN1M_EMU_LIBRARY, else the newest below build/ without sanitizers."""
    if named := os.environ.get("QWEN1M_EMU_LIBRARY"):
        path = Path(named)
        assert path.is_file(), f"QWEN1M_EMU_LIBRARY: expected a file, got {named}"
        return path
    # Not that of the sanitizers: Python could not load it.
    found = [p for p in ROOT.glob("build/*/libqwen1m_emu_ops.so") if p.parent.name != "asan"]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise FileNotFoundError("libqwen1m_emu_ops.so: build the C++ tests first (make test)")
    return ctypes.CDLL(str(path))


class EmulatorIssue(AssertionError):
    """The emulator found a broken rule of the hardware; the text has a line for each."""


def _call(
    op: str,
    device: str,
    *arguments: Tensor | float | None,
    schedule_seed: int = 1,
    **named: Tensor | float | None,
) -> None:
    """An operator by its emulated kernel.

    The entry point takes the tensors of the op's signature as one array, then its numbers.

    Args:
        op: One of OPS.
        device: A key of ARCHITECTURES.
        arguments, named: those of ops.<op>; the tensors lie on the host.
        schedule_seed: Of the emulator's schedule and of when its copies land.

    Raises:
        EmulatorIssue: The kernel broke a rule.
        RuntimeError: An argument was refused.
    """
    signature = inspect.signature(getattr(ops, op))
    bound = signature.bind(*arguments, **named)
    bound.apply_defaults()
    tensors, numbers = [], []
    for name, value in bound.arguments.items():
        kind = str(signature.parameters[name].annotation)
        if "Tensor" in kind:
            tensors.append(value)
        else:
            numbers.append(ctypes.c_double(value) if kind == "float" else ctypes.c_int64(value))
    text = ctypes.create_string_buffer(1 << 16)
    call = _Call(
        ARCHITECTURES[device], schedule_seed, ctypes.cast(text, ctypes.c_char_p), len(text)
    )
    views = (_Tensor * len(tensors))(*map(_Tensor.of, tensors))
    code = getattr(_library(), f"qwen1m_emu_{op}")(views, *numbers, ctypes.byref(call))
    if code == 1:
        raise EmulatorIssue(text.value.decode())
    if code != 0:
        raise RuntimeError(text.value.decode())


def _decode_attention(
    op: str, device: str, *arguments: Tensor | int | None, **named: Tensor | int | None
) -> None:
    """With scratch, which may be left out; its counters have to be zero again afterwards."""
    bound = inspect.signature(ops.decode_attention).bind(*arguments, **named)
    values = bound.arguments
    if values.get("scratch") is None:
        shapes = [values[x] for x in ("q", "k_cache", "block_table", "chunk_size", "local_size")]
        values["scratch"] = ops.decode_attention_scratch(*shapes, EMULATED_SMS)
    _call(op, device, **values)
    assert not values["scratch"][:COUNTER_BYTES].any(), f"{op}: a counter was not reset"


@contextmanager
def emulated_ops(device: str) -> Iterator[list[str]]:
    """All of `ops` by emulated kernels, as a GPU would have them; their names as they are called.

    A capture (`lib.capture.Recorder`) keeps the calls, as it keeps torch's.
    """
    called: list[str] = []

    def kernel(name: str) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            called.append(name)
            if name == "decode_attention":
                scratch = inspect.signature(ops.decode_attention)
                bound = scratch.bind(*arguments, **named).arguments
                assert bound.get("scratch") is not None, "a step would allocate scratch"
            if isinstance(mode := _get_current_dispatch_mode(), Recorder):
                mode.ops.append(f"qwen1m.{name}")
                mode.tape.append((call, arguments, named))
            _call(name, device, *arguments, **named)

        call.__signature__ = inspect.signature(getattr(ops, name))  # type: ignore[attr-defined]
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPS:
            patch.setattr(ops, name, kernel(name))
        yield called
