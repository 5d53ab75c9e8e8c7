"""Which op tests the GPU kernels cannot take part in, and why; conftest.py skips these visibly."""

from __future__ import annotations

from typing import Any

import torch

from lib.cases import case

HEAD_DIMS = (64, 128)
# Tests of prefill_attention with inputs of their own; tests/cuda/test_gpu_ops.py does the same with
# inputs that the GPU kernels take.
OF_THE_CPU = {
    "test_extreme_logits": "float32 inputs of head_dim 16",
    "test_a_chunk_that_never_ends_is_plain_rope": "float32 inputs",
    "test_threads_do_not_change_bits": "no threads to vary",
    "test_refuses": "values on the device are not checked",
    "test_refuses_head_geometry": "float32 inputs",
}


def why_not_on_gpu(op: str, test: str, parameters: dict[str, Any]) -> str | None:
    """None if the GPU kernels of an op can do what a test asks for.

    Args:
        op: name of the operator.
        test: name of the test function.
        parameters: of the parametrised test: case (or name, of a case) and dtype.
    """
    if op != "prefill_attention":
        return f"no GPU kernel of {op} exists yet"
    if test in OF_THE_CPU:
        return OF_THE_CPU[test]
    if parameters.get("dtype", "bf16") not in ("bf16", torch.bfloat16):
        return f"the kernels of {op} take bfloat16 only"
    inputs = parameters.get("case") or (
        case(op, parameters["name"]) if "name" in parameters else {}
    )
    if inputs.get("head_dim", HEAD_DIMS[0]) not in HEAD_DIMS:
        return f"the kernels of {op} have head_dim 64 and 128, not {inputs['head_dim']}"
    if inputs.get("row_pad", 0) % 8:
        return f"the kernels of {op} need rows aligned to 16 bytes"
    return None
