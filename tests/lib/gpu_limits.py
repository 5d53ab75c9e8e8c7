"""Which op tests the GPU kernels cannot take part in, and why; conftest.py skips these visibly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib.cases import Case, case

# Tests with inputs of their own, or about values that a GPU does not look at. What the kernels
# refuse is tested by tests/ops/test_gpu_refusals.py and tests/cuda/test_gpu_ops.py.
OF_THE_CPU = {
    "prefill_attention": {
        "test_extreme_logits": "float32 inputs of head_dim 16",
        "test_a_chunk_that_never_ends_is_plain_rope": "float32 inputs",
        "test_threads_do_not_change_bits": "no threads to vary",
        "test_refuses": "values on the device are not checked",
        "test_refuses_head_geometry": "float32 inputs",
    },
    "decode_attention": {
        "test_empty_sequence_gives_zero_and_minus_infinity": "float32 inputs",
        "test_a_chunk_that_never_ends_is_plain_rope": "float32 inputs",
        "test_threads_do_not_change_bits": "no threads to vary",
    },
    "sparse_estimate": {"test_a_diagonal_is_an_offset": "float32 inputs of head_dim 16"},
}
# An emulated cluster takes as long as ten blocks: what the kernel of one block shows is enough.
OF_ONE_BLOCK = {
    "sample": (
        "test_every_backend_draws_the_same_token",
        "test_the_steps_are_those_of_the_engines_sampler",
        "test_another_seed_or_position_is_another_draw",
        "test_ties",
    )
}
REFUSALS = {
    "test_refuses": "the refusals of the CPU backend",
}


def _attention(inputs: Case, _: Any) -> str | None:
    if inputs.get("head_dim", 64) not in (64, 128):
        return f"head_dim 64 and 128, not {inputs['head_dim']}"
    return _multiple("rows", inputs.get("row_pad", 0), 8)


def _sparse_estimate(inputs: Case, _: Any) -> str | None:
    if inputs.get("rows", 0) > 64:
        return f"at most 64 rows, not {inputs['rows']}"
    return _attention(inputs, _)


def _sparse_prefill(inputs: Case, _: Any) -> str | None:
    if (tile := inputs.get("tile_tokens", 128)) not in (64, 128, 256):
        return f"tiles of 64, 128 and 256 tokens, not {tile}"
    return _attention(inputs, _)


def _multiple(what: str, size: int, of: int) -> str | None:
    return f"{what} of a multiple of {of} elements, not {size}" if size % of else None


def _rms_norm(inputs: Case, _: Any) -> str | None:
    return _multiple("rows", inputs.get("hidden", 0), 8) or _multiple(
        "row strides", inputs.get("row_stride", 0), 8
    )


def _swiglu(inputs: Case, _: Any) -> str | None:
    return _multiple("rows", inputs.get("intermediate", 0), 8) or _multiple(
        "row strides", inputs.get("row_stride", 0), 8
    )


def _embedding(inputs: Case, dtype: Any) -> str | None:
    elems = 4 if dtype == torch.float32 else 8
    return _multiple("rows", inputs.get("hidden", 0), elems) or _multiple(
        "row strides", inputs.get("row_stride", 0), elems
    )


def _qkv_rope_append(inputs: Case, _: Any) -> str | None:
    return _multiple("heads", inputs.get("head_dim", 0), 16) or _multiple(
        "row strides", inputs.get("row_stride", 0), 8
    )


def _sample(inputs: Case, dtype: Any) -> str | None:
    return None  # rows of any width, if they begin aligned


DEMANDS: dict[str, Callable[[Case, Any], str | None]] = {
    "decode_attention": _attention,
    "embedding": _embedding,
    "prefill_attention": _attention,
    "qkv_rope_append": _qkv_rope_append,
    "rms_norm": _rms_norm,
    "sample": _sample,
    "sparse_estimate": _sparse_estimate,
    "sparse_plan": lambda _, __: None,
    "sparse_prefill": _sparse_prefill,
    "swiglu": _swiglu,
    "widen_pages": lambda inputs, _: _multiple("heads", inputs.get("head_dim", 0), 8),
}
"""What a kernel has instead of a case's shape, if it cannot take that."""


def why_not_on_gpu(op: str, test: str, parameters: dict[str, Any]) -> str | None:
    """None if the GPU kernels of an op can do what a test asks for.

    Args:
        op: name of the operator.
        test: name of the test function.
        parameters: of the parametrised test: device, case (or name, of a case) and dtype.
    """
    if op not in DEMANDS:
        return f"no GPU kernel of {op} exists yet"
    if reason := OF_THE_CPU.get(op, {}).get(test) or REFUSALS.get(test):
        return reason
    if parameters.get("device") == "emu_sm90" and test in OF_ONE_BLOCK.get(op, ()):
        return "shown by the kernel of one block"
    dtype = parameters.get("dtype", "bf16")
    if op not in ("embedding", "sample") and dtype not in ("bf16", torch.bfloat16):
        return f"the kernels of {op} take bfloat16 only"
    inputs = parameters.get("case") or (
        case(op, parameters["name"]) if "name" in parameters else {}
    )
    missing = DEMANDS[op](inputs, dtype)
    return f"the kernels of {op} have {missing}" if missing else None
