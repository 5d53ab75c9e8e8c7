"""What the dispatcher knows of the ops: schemas, fakes, and the CUDA key of every build."""

from __future__ import annotations

import pytest
import torch

from lib.arguments import good_arguments
from qwen1m_ext import ops
from qwen1m_ext._host import build_info

OPTIONAL = {
    "rms_norm": "residual",
    "qkv_rope_append": "bias",
    "sample": "logprobs",
    "prefill_attention": "lse",
    "decode_attention": "lse",
    "sparse_prefill": "lse",
}


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor",
          "test_aot_dispatch_dynamic")  # fmt: skip


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_opcheck(op: str, device: str) -> None:
    """Schema, mutation, autograd registration and fake, as torch.library sees them."""
    overload = getattr(torch.ops.qwen1m, op).default
    # torch compares what the schema says is not written, and cannot compare fp8.
    checks = CHECKS[1:] if op == "widen_pages" else CHECKS
    torch.library.opcheck(overload, tuple(good_arguments(op, device).values()), test_utils=checks)
    if op in OPTIONAL:
        arguments = good_arguments(op, device) | {OPTIONAL[op]: None}
        torch.library.opcheck(overload, tuple(arguments.values()))


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_argument_names_are_those_of_the_wrapper(op: str) -> None:
    """Keyword calls of the wrapper and of the raw op mean the same."""
    schema = getattr(torch.ops.qwen1m, op).default._schema
    assert [argument.name for argument in schema.arguments] == list(good_arguments(op))
    assert not schema.returns
    by_wrapper, by_op = good_arguments(op), good_arguments(op)
    getattr(ops, op)(**by_wrapper)
    getattr(torch.ops.qwen1m, op)(**by_op)
    written = next(iter(by_wrapper))  # out or q
    assert torch.equal(by_wrapper[written], by_op[written])
    assert by_op[written].any()


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_the_cuda_key_is_always_registered(op: str) -> None:
    """A CUDA tensor meets an error of ours, not "no kernel registered for CUDA"."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qwen1m::{op}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qwen1m::{op}", "CUDA")
    # No GPU is needed to reach the CUDA kernel: redispatch names the key, whatever the tensors are.
    overload = getattr(torch.ops.qwen1m, op).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    if not build_info()["cuda"]:
        error = f"{op}: qwen1m_ext was built without CUDA"
    elif op in ops.cuda_kernels():
        error = rf"{op}: \w+: expected a CUDA tensor, got a tensor of another device"
    else:
        error = f"{op}: no CUDA kernel exists for it yet"
    with pytest.raises(RuntimeError, match=error):
        overload.redispatch(cuda, *good_arguments(op).values())


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_meta_tensors_run_no_kernel(op: str) -> None:
    """The fake returns nothing and reads nothing."""
    arguments = good_arguments(op, "meta")
    assert getattr(ops, op)(**arguments) is None
