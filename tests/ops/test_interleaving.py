"""Our attention between torch's own matrix products, in one process and on one pool of threads.

Where the processor has AMX, torch's bf16 products and our kernels use the same tile registers, and
each keeps a configuration in them. tests/cpp/attention_test.cpp does the same with software tiles,
on any machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.compare import assert_same_bits
from lib.generator import tensor
from qwen1m_ext import ops

Op = Callable[[], Tensor]


def linear(rows: int, columns: int, inner: int) -> Op:
    """A bf16 matrix product; odd sizes make oneDNN configure tiles that are not full."""
    x = tensor(1, rows, inner, dtype=torch.bfloat16)
    weight = tensor(2, columns, inner, dtype=torch.bfloat16)
    return lambda: F.linear(x, weight)


def attention(q_tokens: int) -> Op:
    """prefill_attention over 300 cached tokens, or decode_attention for one query token."""
    q = tensor(3, q_tokens, 4, 64, dtype=torch.bfloat16)
    k_cache, v_cache = (tensor(s, 3, 2, 128, 64, dtype=torch.bfloat16) for s in (4, 5))
    block_table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    rope_table = tensor(6, 300, 32, 2)
    kv_len, scale = torch.tensor([300]), torch.tensor([0.125])

    def run() -> Tensor:
        out = torch.empty_like(q)
        cache, rest = (k_cache, v_cache, block_table), (rope_table, 256, 32)
        if q_tokens == 1:
            ops.decode_attention(out[None], None, q[None], *cache, kv_len, scale[None], *rest)
        else:
            cu_q = torch.tensor([0, q_tokens])
            ops.prefill_attention(out, None, q, *cache, cu_q, kv_len, scale, *rest)
        return out

    return run


@pytest.mark.isa
def test_attention_and_linear_layers_do_not_disturb_each_other() -> None:
    """Each result has the bits it has when nothing else runs."""
    linears = [linear(96, 160, 64), linear(33, 17, 70), linear(1, 96, 64)]
    attentions = [attention(64), attention(1), attention(37)]
    # Alone: the second of two calls in a row, so that each op has found its own state once.
    alone = {op: (op(), op())[1] for op in (*linears, *attentions)}
    for round_ in range(12):
        for i in range(len(linears)):
            for op in (linears[i], attentions[(i + round_) % len(attentions)]):
                assert_same_bits(op(), alone[op])
