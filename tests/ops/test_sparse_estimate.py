"""sparse_estimate against its float64 definition, its bits, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import DTYPES, THETA, AttentionInputs, Case, arithmetic_of, attention_inputs, cases
from lib.cases import case as case_of
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference import sparse as reference
from reference.rope import rope_table


def estimate_inputs(case: Case, dtype: torch.dtype) -> AttentionInputs:
    """The last `rows` of `end` tokens, with a rotary table for the critical positions."""
    inputs = attention_inputs(case | {"kv_len": [case["end"]], "q_len": [case["rows"]]}, dtype)
    chunk_len = case["chunk_size"] - case["local_size"]
    rows = case["end"] if case["end"] <= chunk_len else case["chunk_size"] + chunk_len
    inputs.rope_table = rope_table(THETA, case["head_dim"], rows).float()
    return inputs


def run(inputs: AttentionInputs, critical: bool, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Call the op into poisoned tensors with gaps; (vertical, slash)."""
    end, heads, where = len(inputs.k[0]), inputs.q.shape[1], torch_device(device)
    vertical, slash = (torch.full((heads, end + 3), float("nan"), device=where) for _ in range(2))
    cache = inputs.cache
    tensors = (
        inputs.q, cache.k_cache, cache.block_table, inputs.logit_scale, inputs.rope_table
    )  # fmt: skip
    operator("sparse_estimate", device)(
        vertical[:, :end], slash[:, :end], *(x.to(where) for x in tensors), end,
        inputs.chunk_size, inputs.local_size, critical,
    )  # fmt: skip
    assert vertical[:, end:].isnan().all() and slash[:, end:].isnan().all()
    return vertical[:, :end], slash[:, :end]


@pytest.mark.isa
@pytest.mark.parametrize("critical", [True, False], ids=["critical", "clamped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("sparse_estimate"))
def test_matches_definition(case: Case, dtype: str, critical: bool, device: str) -> None:
    """Pages, pieces, stages, few rows and many, over a NaN-poisoned cache."""
    inputs = estimate_inputs(case, DTYPES[dtype])
    vertical, slash = (x.cpu() for x in run(inputs, critical, device))
    expected = reference.estimate(
        inputs.q, inputs.k[0], inputs.logit_scale[0].item(), inputs.rope_table, inputs.chunk_size,
        inputs.local_size, critical,
    )  # fmt: skip
    budget, factor = f"estimate/{arithmetic_of(dtype, device)}", max(1.0, case["logit_factor"])
    assert_close(vertical, expected[0], budget, "vertical", factor)
    assert_close(slash, expected[1], budget, "slash", factor)
    # Every row's probabilities are in there once.
    total = torch.full((len(vertical),), float(case["rows"]))
    torch.testing.assert_close(vertical.double().sum(-1).float(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(slash.double().sum(-1).float(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    """1, 2 and 3 threads."""
    inputs = estimate_inputs(case_of("sparse_estimate", "several_pieces"), dtype)
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(run(inputs, True))
    for other in outputs[1:]:
        for actual, first in zip(other, outputs[0], strict=True):
            assert_same_bits(actual, first)


def test_a_diagonal_is_an_offset() -> None:
    """Equal keys: each row of n spreads 1 / (i + 1), so offset o gets one share of each row."""
    end, n = 300, 3
    inputs = AttentionInputs(
        q=torch.ones(n, 1, 16),
        k=[torch.ones(end, 1, 16)],
        v=[torch.ones(end, 1, 16)],
        q_len=[n],
        logit_scale=torch.tensor([1.0]),
        rope_table=torch.tensor([1.0, 0.0]).expand(end, 8, 2).contiguous(),
        chunk_size=ops.INFINITE_CHUNK,
        local_size=0,
    )
    vertical, slash = run(inputs, False)
    share = [1 / (end - 2), 1 / (end - 1), 1 / end]
    expected = torch.full((end,), sum(share))
    expected[-2:] = torch.tensor([share[1] + share[2], share[2]])
    torch.testing.assert_close(vertical[0], expected)
    torch.testing.assert_close(slash[0], expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(vertical=lambda t: t.double()), ("vertical", "float32", "float64")),
        (dict(vertical=lambda t: t[:, :-1].contiguous()), ("vertical", "130", "129")),
        (dict(vertical=lambda t: t.T.contiguous().T), ("vertical", "contiguous")),
        (dict(vertical=lambda t: t[:1].expand(2, -1)), ("vertical", "overlap")),
        (dict(slash=lambda t: t[:1]), ("slash", "2", "1")),
        (dict(q=lambda t: t.double()), ("q", "float32", "float64")),
        (dict(q=lambda t: t[:0]), ("q", "0")),
        (dict(q=lambda t: t.repeat(4, 1, 1)), ("q", "begins at 120", "110")),
        (dict(k_cache=lambda t: t.bfloat16()), ("k_cache", "float32", "bfloat16")),
        (dict(block_table=lambda t: t + torch.tensor([[0, 2]]).int()),
         ("block_table[0, 1]", "pages = 2", "2")),
        (dict(block_table=lambda t: t.expand(2, -1)), ("block_table", "1", "2")),
        (dict(logit_scale=lambda t: -t), ("logit_scale[0]", "-0.250000")),
        (dict(rope_table=lambda t: t[:57]), ("rope_table", "58", "57")),
        (dict(segment_end=lambda _: 257), ("segment_end", "256", "257")),
        (dict(segment_end=lambda _: 0), ("segment_end", "0")),
        (dict(chunk_size=lambda _: 0), ("chunk_size", "0")),
        (dict(local_size=lambda _: 48), ("local_size", "48")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...]) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(
        ops.sparse_estimate, good_arguments("sparse_estimate"), change, ("sparse_estimate", *text)
    )


def test_clamped_positions_need_no_more_rows_than_attention() -> None:
    """The rows up to m + chunk_size are for the critical positions."""
    arguments = good_arguments("sparse_estimate")
    arguments |= dict(rope_table=arguments["rope_table"][:49], critical=False)
    ops.sparse_estimate(**arguments)
    assert arguments["vertical"].any()
