"""swiglu against its float64 definition, and its refusals."""

from __future__ import annotations

import pytest
import torch

from lib.arguments import good_arguments
from lib.cases import DTYPES, SEEDS, Case, assert_gaps_untouched, cases, strided
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import tensor
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.swiglu import swiglu as reference


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("swiglu"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Every shape edge, strided rows, saturated and tiny gates."""
    tokens, width = case["tokens"], case["intermediate"]
    values = tensor(SEEDS["gate_up"], tokens, 2 * width) * case["amplitude"]
    gate_up = strided(values.to(DTYPES[dtype]), case["row_stride"])
    where = torch_device(device)
    gap = 3 if device == "cpu" else 8
    out = strided(torch.zeros(tokens, width, dtype=DTYPES[dtype]), width + gap).to(where)
    operator("swiglu", device)(out, gate_up.to(where))
    assert_close(out, reference(gate_up), f"swiglu/{dtype}")
    if where == "cpu":
        assert_gaps_untouched(out)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(dtype: str, device: str) -> None:
    """Gates over the whole range where SiLU is not trivial, and where exp overflows."""
    gate = torch.cat((torch.linspace(-110, 110, 4004), torch.tensor([-3e38, 3e38, 0.0, -0.0])))
    gate_up = torch.stack((gate, torch.ones_like(gate))).reshape(1, -1).to(DTYPES[dtype])
    where = torch_device(device)
    out = torch.zeros(1, len(gate), dtype=DTYPES[dtype], device=where)
    operator("swiglu", device)(out, gate_up.to(where))
    assert_close(out, reference(gate_up), f"swiglu/{dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite(dtype: str, device: str) -> None:
    """NaN passes through; +inf gates give +inf; -inf gates give what the definition gives, NaN."""
    gate = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf"), 2.0, -2.0, 0.0, 3.0])
    up = torch.tensor([1.0, float("nan"), 1.0, 1.0, float("inf"), float("inf"), 4.0, 2.0])
    gate_up = torch.cat((gate, up))[None].to(DTYPES[dtype])
    where = torch_device(device)
    out = torch.zeros(1, 8, dtype=DTYPES[dtype], device=where)
    operator("swiglu", device)(out, gate_up.to(where))
    assert_close(out, reference(gate_up), f"swiglu/{dtype}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_row_does_not_depend_on_other_rows(dtype: torch.dtype, device: str) -> None:
    """A row alone, in a batch, with 1 or 2 threads: the same bits."""
    width, where = (131 if device == "cpu" else 136), torch_device(device)
    gate_up = tensor(1, 300, 2 * width, dtype=dtype).to(where)
    together = torch.zeros(300, width, dtype=dtype, device=where)
    call = operator("swiglu", device)
    call(together, gate_up)
    alone = torch.zeros_like(together)
    for row in range(0, 300, 7):
        call(alone[row : row + 1], gate_up[row : row + 1])
    assert_same_bits(alone[::7], together[::7])
    for count in (1, 2):
        with threads(count):
            out = torch.zeros_like(together)
            call(out, gate_up)
        assert_same_bits(out, together, f"{count} threads")


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    """Rows 2^31 elements apart (4 GiB of untouched memory, little of it resident)."""
    stride = 2**31 + 24
    where = torch_device(device)
    storage = torch.empty(stride + 96, dtype=torch.bfloat16, device=where)
    gate_up = storage.as_strided((2, 96), (stride, 1))
    values = tensor(1, 2, 96, dtype=torch.bfloat16)
    gate_up.copy_(values)
    out = torch.zeros(2, 48, dtype=torch.bfloat16, device=where)
    operator("swiglu", device)(out, gate_up)
    assert_close(out, reference(values), "swiglu/bf16")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("out", "float32", "bfloat16")),
        (dict(gate_up=lambda t: t.double()), ("gate_up", "float32", "float64")),
        (dict(out=lambda t: t[:3]), ("gate_up", "tokens=3", "[4, 32]")),
        (dict(gate_up=lambda t: t[:, :31]), ("gate_up", "32", "31")),
        (dict(gate_up=lambda t: t[0]), ("gate_up", "2 intermediate", "[32]")),
        (dict(out=lambda t: t.t().contiguous().t()), ("out", "contiguous", "4")),
        (dict(gate_up=lambda t: t.t().contiguous().t()), ("gate_up", "contiguous", "4")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value."""
    refuses(ops.swiglu, good_arguments("swiglu", device), change, ("swiglu", *text))
