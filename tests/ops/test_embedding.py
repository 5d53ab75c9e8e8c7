"""embedding against its definition, and its refusals."""

from __future__ import annotations

import pytest
import torch

from lib.arguments import good_arguments
from lib.cases import DTYPES, SEEDS, Case, assert_gaps_untouched, case, cases, spread, strided
from lib.compare import assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import shuffled, tensor
from lib.refuse import refuses
from qwen1m_ext import ops
from reference.embedding import embedding as reference


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, token_ids) of a case: every id in a shuffled order, again and again."""
    vocab, tokens = case["vocab"], case["tokens"]
    weight = tensor(SEEDS["embedding"], vocab, case["hidden"], dtype=dtype)
    order = shuffled(SEEDS["embedding"] + 1, vocab)
    ids = torch.tensor([order[i % vocab] for i in range(tokens)], dtype=torch.int64)
    return strided(weight, case["row_stride"]), ids


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", cases("embedding"))
def test_matches_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    """Bit for bit, strided rows and ids that are not contiguous included."""
    weight, ids = inputs(case, dtype)
    where = torch_device(device)
    out = strided(torch.zeros(case["tokens"], case["hidden"], dtype=dtype), case["row_stride"])
    out = out.to(where)
    operator("embedding", device)(out, weight.to(where), spread(ids).to(where))
    assert_same_bits(out.cpu().contiguous(), reference(weight, ids))
    if where == "cpu":
        assert_gaps_untouched(out)


def test_an_id_outside_of_the_table(device: str) -> None:
    """NaN where ids lie on a device; on the CPU it is refused (test_refuses)."""
    if device == "cpu":
        pytest.skip("cpu: refused")
    weight, ids = inputs(case("embedding", "vectors_of_8"), torch.bfloat16)
    expected = reference(weight, ids)
    for token, bad in ((0, -1), (5, len(weight)), (66, 2**62)):
        ids[token] = bad
        expected[token] = float("nan")
    where = torch_device(device)
    out = torch.zeros_like(expected).to(where)
    operator("embedding", device)(out, weight.to(where), ids.to(where))
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert_same_bits(out.cpu().nan_to_num(), expected.nan_to_num())


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    """The last row of a table of more than 2^31 elements (never resident as a whole)."""
    rows, where = 2**31 // 64 + 3, torch_device(device)
    weight = torch.empty(rows, 64, dtype=torch.bfloat16, device=where)
    weight[-1] = tensor(1, 64).bfloat16()
    out = torch.zeros(1, 64, dtype=torch.bfloat16, device=where)
    operator("embedding", device)(out, weight, torch.tensor([rows - 1], device=where))
    assert_same_bits(out[0], weight[-1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("weight", "bfloat16", "float32")),
        (dict(weight=lambda t: t.double()), ("weight", "float32", "float64")),
        (dict(token_ids=lambda t: t.int()), ("token_ids", "int64", "int32")),
        (dict(token_ids=lambda t: t[:2]), ("token_ids", "3", "2")),
        (dict(token_ids=lambda t: t + 1), ("token_ids[0]", "8")),
        (dict(token_ids=lambda t: t - 1), ("token_ids[1]", "-1")),
        (dict(weight=lambda t: t[:, :31]), ("weight", "32", "31")),
        (dict(weight=lambda t: t.t().contiguous().t()), ("weight", "contiguous")),
        (dict(out=lambda t: t.t().contiguous().t()), ("out", "contiguous")),
        (dict(out=lambda t: t[:1].expand(3, 32)), ("out", "overlap")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(ops.embedding, good_arguments("embedding", device), change, ("embedding", *text))
