"""widen_pages against its definition, bit for bit, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import DTYPES, PAGE_SIZE, Case, case, cases, spread
from lib.compare import assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import shuffled
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.fp8 import dequantise


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, pages): every code in shuffled order, again and again."""
    shape = case["num_pages"], case["kv_heads"], PAGE_SIZE, case["head_dim"]
    order = torch.tensor(shuffled(1, 256), dtype=torch.uint8)
    count = torch.Size(shape).numel()
    codes = order.repeat(-(-count // 256))[:count].view(shape).view(torch.float8_e4m3fn)
    scale = 2.0 ** torch.tensor(case["exponents"], dtype=torch.float32)
    return codes, scale, torch.tensor(case["pages"], dtype=torch.int64)


def run(codes: Tensor, scale: Tensor, pages: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The op into pages that hold -1."""
    where = torch_device(device)
    wide = torch.full(codes.shape, -1, dtype=dtype, device=where)
    operator("widen_pages", device)(wide, codes.to(where), scale.to(where), pages.to(where))
    return wide.cpu()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("widen_pages"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Every code, scales that are powers of two: exact, in bf16 too; NaN stays; other pages do."""
    codes, scale, pages = inputs(case)
    wide = run(codes, scale, spread(pages), DTYPES[dtype], device)
    expected = torch.full(codes.shape, -1, dtype=torch.float64)
    expected[pages] = dequantise(codes, scale[:, None, None])[pages]
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide.double().nan_to_num(), expected.nan_to_num())
    assert torch.equal(wide.signbit()[~wide.isnan()], expected.signbit()[~wide.isnan()])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_scale_is_one_rounding(dtype: torch.dtype, device: str) -> None:
    """A product that bf16 does not hold goes to the nearest, and is the same on every backend."""
    codes, _, pages = inputs(case("widen_pages", "head_dim_64"))
    scale = torch.tensor([0.3, 1.1, 5e-3, 7.7])
    wide = run(codes, scale, pages, dtype, device)[pages]
    exact = codes.float() * scale[:, None, None]  # the product in fp32
    assert_same_bits(wide.nan_to_num(), exact.to(dtype)[pages].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    """1, 2 and 3 threads."""
    arguments = *inputs(case("widen_pages", "head_dim_128")), dtype, "cpu"
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(run(*arguments).nan_to_num())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_page_outside_of_the_cache(device: str) -> None:
    """Not written where pages lie on a device; on the CPU it is refused (test_refuses)."""
    if device == "cpu":
        pytest.skip("cpu: refused")
    codes, scale, pages = inputs(case("widen_pages", "vectors_of_8"))
    expected = run(codes, scale, pages, torch.bfloat16, device)
    bad = torch.tensor([-1, len(codes), 2**40, -(2**62)])
    wide = run(codes, scale, torch.cat((bad, pages)), torch.bfloat16, device)
    assert_same_bits(wide.nan_to_num(), expected.nan_to_num())


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    """The last page of more than 2^31 elements (never resident as a whole)."""
    num_pages, where = 2**31 // (2 * PAGE_SIZE * 64) + 2, torch_device(device)
    shape = num_pages, 2, PAGE_SIZE, 64
    codes = torch.empty(shape, dtype=torch.uint8, device=where).view(torch.float8_e4m3fn)
    wide = torch.empty(shape, dtype=torch.bfloat16, device=where)
    small, scale, _ = inputs(case("widen_pages", "no_page"))
    codes[-1] = small[0].to(where)
    operator("widen_pages", device)(
        wide, codes, scale.to(where), torch.tensor([num_pages - 1], device=where)
    )
    expected = dequantise(small[0], scale[:, None, None]).bfloat16()
    assert_same_bits(wide[-1].cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(wide=lambda t: t.double()), ("wide", "float32", "float64")),
        (dict(wide=lambda t: t[:, :1].contiguous()), ("codes", "kv_heads=1", "[4, 2, 128, 16]")),
        (dict(wide=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
         ("wide", "contiguous")),
        (dict(codes=lambda t: t.float()), ("codes", "float8_e4m3fn", "float32")),
        (dict(codes=lambda t: t[..., :8].contiguous()), ("codes", "16", "8")),
        (dict(codes=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
         ("codes", "contiguous")),
        (dict(scale=lambda t: t.double()), ("scale", "float32", "float64")),
        (dict(scale=lambda t: t[:1]), ("scale", "2", "1")),
        (dict(scale=lambda t: t - 2), ("scale[0]", "> 0")),
        (dict(scale=lambda t: t / 0), ("scale[0]", "finite", "inf")),
        (dict(pages=lambda t: t.int()), ("pages", "int64", "int32")),
        (dict(pages=lambda t: t + 1), ("pages[0]", "[0, pages=4)", "4")),
        (dict(pages=lambda t: t - 2), ("pages[1]", "[0, pages=4)", "-1")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    arguments = good_arguments("widen_pages", device)
    refuses(ops.widen_pages, arguments, change, ("widen_pages", *text))
