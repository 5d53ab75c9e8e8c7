"""rms_norm against its float64 definition, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import DTYPES, SEEDS, Case, assert_gaps_untouched, case, cases, strided
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import tensor
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.rms_norm import rms_norm as reference


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, residual or None) of a case."""
    shape = (case["tokens"], case["hidden"])
    x = tensor(SEEDS["x"], *shape) * case["amplitude"]
    residual = tensor(SEEDS["residual"], *shape) * case["amplitude"]
    return (
        strided(x.to(dtype), case["row_stride"]),
        tensor(SEEDS["weight"], case["hidden"], dtype=dtype),
        strided(residual.to(dtype), case["row_stride"]) if case["residual"] else None,
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("rms_norm"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Every shape edge, strided rows, with and without the residual."""
    x, weight, residual = inputs(case, DTYPES[dtype])
    expected, expected_residual = reference(x, weight, case["eps"], residual)
    x_before = x.clone()

    where = torch_device(device)
    on = lambda t: None if t is None else t.to(where)  # noqa: E731
    out = strided(torch.zeros_like(x), case["row_stride"])
    out, residual, x, weight = on(out), on(residual), on(x), on(weight)
    operator("rms_norm", device)(out, residual, x, weight, case["eps"])

    assert_close(out, expected, f"rms_norm/{dtype}")
    assert_same_bits(x.cpu(), x_before, "x")
    if expected_residual is not None:  # an addition rounded once: exact
        assert_same_bits(residual.cpu().contiguous(), expected_residual, "residual")
    if where == "cpu":
        assert_gaps_untouched(out)
        if residual is not None:
            assert_gaps_untouched(residual)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_out_may_be_x(dtype: torch.dtype, with_residual: bool, device: str) -> None:
    """In place gives the bits of the two-buffer call."""
    name = "odd_width" if device == "cpu" else "vectors_of_8"
    x, weight, residual = (
        t.to(torch_device(device)) for t in inputs(case("rms_norm", name), dtype)
    )
    call = operator("rms_norm", device)
    out, residual_1, residual_2 = torch.zeros_like(x), residual.clone(), residual.clone()
    call(out, residual_1 if with_residual else None, x, weight, 1e-6)
    call(x, residual_2 if with_residual else None, x, weight, 1e-6)
    assert_same_bits(x, out)
    assert_same_bits(residual_2, residual_1, "residual")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_row_does_not_depend_on_other_rows(dtype: torch.dtype, device: str) -> None:
    """A row alone, in a batch, with 1 or 2 threads: the same bits."""
    width, where = (331 if device == "cpu" else 328), torch_device(device)
    x, weight = (tensor(i + 1, *shape, dtype=dtype).to(where)
                 for i, shape in enumerate(((300, width), (width,))))  # fmt: skip
    call = operator("rms_norm", device)
    together = torch.zeros_like(x)
    call(together, None, x, weight, 1e-6)
    alone = torch.zeros_like(x)
    for row in range(0, 300, 7):
        call(alone[row : row + 1], None, x[row : row + 1], weight, 1e-6)
    assert_same_bits(alone[::7], together[::7])
    for count in (1, 2):
        with threads(count):
            out = torch.zeros_like(together)
            call(out, None, x, weight, 1e-6)
        assert_same_bits(out, together, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: str, device: str) -> None:
    """A NaN spoils its own row and no other; an infinite value gives what the definition gives."""
    where = torch_device(device)
    x = tensor(1, 5, 40, dtype=DTYPES[dtype]).to(where)
    weight = tensor(2, 40, dtype=DTYPES[dtype]).to(where)
    x[1, 39], x[3, 0] = float("nan"), float("inf")
    out = torch.zeros_like(x)
    operator("rms_norm", device)(out, None, x, weight, 1e-6)
    assert_close(out, reference(x.cpu(), weight.cpu(), 1e-6)[0], f"rms_norm/{dtype}")


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    """Rows 2^31 elements apart (4 GiB of untouched memory, little of it resident)."""
    stride = 2**31 + 24
    storage = torch.empty(stride + 48, dtype=torch.bfloat16, device=torch_device(device))
    x = storage.as_strided((2, 48), (stride, 1))
    values, weight = tensor(1, 2, 48, dtype=torch.bfloat16), tensor(2, 48, dtype=torch.bfloat16)
    x.copy_(values)
    operator("rms_norm", device)(x, None, x, weight.to(x.device), 1e-6)
    assert_close(x, reference(values, weight, 1e-6)[0], "rms_norm/bf16")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("out", "float32", "bfloat16")),
        (dict(residual=lambda t: t.bfloat16()), ("residual", "float32", "bfloat16")),
        (dict(weight=lambda t: t.bfloat16()), ("weight", "float32", "bfloat16")),
        (dict(x=lambda t: t.double(), out=lambda t: t.double()), ("float32", "float64")),
        (dict(x=lambda t: t.half(), out=lambda t: t.half()), ("float32", "float16")),
        (dict(out=lambda t: t[:3]), ("out", "4", "3")),
        (dict(residual=lambda t: t[:, :31]), ("residual", "32", "31")),
        (dict(weight=lambda t: t[:31]), ("weight", "32", "31")),
        (dict(x=lambda t: t[0]), ("x", "[tokens, hidden]", "[32]")),
        (dict(x=lambda t: t.t().contiguous().t()), ("x", "contiguous", "4")),
        (dict(weight=lambda t: t.repeat_interleave(2)[::2]), ("weight", "contiguous", "2")),
        (dict(eps=lambda _: 0.0), ("eps", "> 0", "0")),
        (dict(eps=lambda _: -1.0), ("eps", "> 0", "-1")),
        (dict(eps=lambda _: float("nan")), ("eps", "> 0", "nan")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value."""
    refuses(ops.rms_norm, good_arguments("rms_norm", device), change, ("rms_norm", *text))
