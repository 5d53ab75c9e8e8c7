"""Matrix products with bf16 and fp8 weights against float64, on every path a CPU can take."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.checkpoints import write_checkpoint
from qwen1m_ext import LLM, linear
from qwen1m_ext.fp8 import FP8, Fp8Matrix, fault, quantise

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["native", "widened"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's own bf16 product, and with widened blocks of 64 weights and 48 rows."""
    monkeypatch.setattr(linear, "has_bf16_product", lambda: request.param == "native")
    monkeypatch.setattr(linear, "BLOCK_BYTES", 1)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 48)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 7, 8, 48, 100])
@pytest.mark.parametrize("shape", [(64, 32), (200, 96), (65, 130)])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8"])
def test_products_are_rounded_once(path: str, rows: int, shape: tuple[int, int], kind: str) -> None:
    dtype = torch.float32 if kind == "fp32" else BF16
    x, dense = normal(rows, shape[1]).to(dtype), normal(*shape, seed=1).to(dtype)
    weight: linear.Matrix = quantise(dense) if kind == "fp8" else dense
    exact = weight.dequantise(torch.float32) if isinstance(weight, Fp8Matrix) else dense
    want = x.double() @ exact.double().t()
    out = torch.full((rows, shape[0]), torch.nan, dtype=dtype)
    linear.project(out, x, weight)
    # one rounding to bf16; the sum in fp32 can turn it by as much as its own error
    rtol = 2.0**-8 if dtype == BF16 else 1e-6
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=3e-6 * math.sqrt(shape[1]))
    assert torch.equal(linear.linear(x, weight), out)
    bias = normal(shape[0], seed=2).to(dtype)
    assert torch.equal(linear.linear(x, weight, bias), out + bias)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every block that is widened."""
    seen: list[int] = []
    original = linear._widened

    def spy(weight: linear.Matrix, dtype: torch.dtype) -> Tensor:
        seen.append(weight.shape[0])
        return original(weight, dtype)

    monkeypatch.setattr(linear, "_widened", spy)
    return seen


def test_the_path_is_chosen_by_cpu_and_rows(
    widened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(64, 32).to(BF16)
    for native, rows, dtype, expected in (
        (True, 100, BF16, 0),
        (False, 7, BF16, 0),
        (False, 8, BF16, 1),
        (False, 100, torch.float32, 0),
    ):
        monkeypatch.setattr(linear, "has_bf16_product", lambda native=native: native)
        widened.clear()
        linear.linear(normal(rows, 32).to(dtype), weight.to(dtype))
        assert len(widened) == expected


def test_cpu_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa, expected in (
        ("portable", False), ("avx512", True), ("avx512_bf16", True), ("amx", True)
    ):  # fmt: skip
        monkeypatch.setattr(linear._host, "build_info", lambda isa=isa: {"cpu_isa_machine": isa})
        monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
        assert linear.has_bf16_product.__wrapped__() == expected
    monkeypatch.setattr(linear.platform, "machine", lambda: "aarch64")
    assert linear.has_bf16_product.__wrapped__()


def test_a_model_computes_the_same_on_a_cpu_without_bf16(
    tmp_path: Path, widened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product of a prefill takes the other path, and no logit moves by more than rounding."""
    directory = write_checkpoint(tmp_path, gain=2.0)
    llm = LLM(directory, dtype="bfloat16", max_model_len=1024, prefill_chunk_tokens=100)
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    has_it = linear.has_bf16_product()
    monkeypatch.setattr(linear, "has_bf16_product", lambda: True)
    native = llm.logits(prompt)
    assert not widened
    monkeypatch.setattr(linear, "has_bf16_product", lambda: False)
    other = llm.logits(prompt)
    assert len(widened) == 2 * (2 * 4 + 1)  # 2 chunks x (2 layers x 4 products and the head)
    if has_it:  # elsewhere torch's own product is no measure: it rounds partial sums to bf16
        torch.testing.assert_close(other, native, atol=0.05, rtol=0.02)


# --- fp8 ------------------------------------------------------------------------------------------


def test_every_code_is_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    number = ~codes.float().isnan()
    for scale in (2.0**-20, 1.0, 64.0):
        matrix = Fp8Matrix(codes[number][:, None], torch.full((int(number.sum()), 1), scale))
        for dtype in (BF16, torch.float32):
            want = (matrix.data.double() * scale).to(dtype)
            assert torch.equal(matrix.dequantise(dtype), want)


def test_rounding_is_to_the_nearest_and_no_row_overflows() -> None:
    matrix = normal(300, 200) * torch.logspace(-6, 4, 300)[:, None]
    matrix[0] = 0
    matrix[1, 0] = 448.0 * 2**5  # exactly the largest
    matrix[1, 1:] = 0.5
    quantised = quantise(matrix)
    assert fault(quantised) is None
    fraction, _ = torch.frexp(quantised.scale)
    assert (fraction == 0.5).all() and float(quantised.scale[1]) == 32 and quantised.scale[0] == 1
    wide = quantised.dequantise(torch.float32)
    # half a unit in the last place of four significant bits; below 2^-6 the steps are equal
    step = (matrix.abs() * 2.0**-4).maximum(quantised.scale * 2.0**-10)
    assert ((wide - matrix).abs() <= step).all()
    used = wide.abs().amax(1)[1:] / quantised.scale[1:, 0]
    assert (used <= 448).all() and (used > 216).all(), "a row gives away range"


def test_faults_are_named() -> None:
    good = quantise(normal(4, 16))
    assert fault(good) is None
    for code in (0x7F, 0xFF):
        data = good.data.clone()
        data.view(torch.uint8)[2, 3] = code
        assert fault(Fp8Matrix(data, good.scale)) == "expected numbers, got NaN"
    for bad in (3.0, 0.0, -0.5, math.inf, math.nan):
        scale = good.scale.clone()
        scale[1] = bad
        assert "powers of two" in str(fault(Fp8Matrix(good.data, scale)))
    for bad in (60_000.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"expected numbers of at most 57344, got {bad}"):
            quantise(torch.tensor([[1.0, bad]]))


def test_the_gpu_s_scaled_product_on_the_cpu() -> None:
    """Its input is rounded to e4m3 too: 2^-4 of a number, and much less of a sum of 256."""
    x, weight = normal(32, 256).to(BF16), quantise(normal(96, 256, seed=1))
    want = x.double() @ weight.dequantise(torch.float32).double().t()
    out = linear.scaled_product(x, weight).double()
    assert (out - want).norm() / want.norm() < 2.0**-5
    zero = linear.scaled_product(torch.zeros(16, 256, dtype=BF16), weight)
    assert not zero.any()


def test_scratch_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(37_888, 3584), (3584, 18_944)]
    monkeypatch.setattr(linear, "has_bf16_product", lambda: True)
    assert linear.scratch_bytes(4096, shapes, BF16, fp8=False) == 0
    assert linear.scratch_bytes(4096, shapes, torch.float32, fp8=False) == 0
    assert 2e6 < linear.scratch_bytes(4096, shapes, BF16, fp8=True) < 8e6
    monkeypatch.setattr(linear, "has_bf16_product", lambda: False)
    assert linear.scratch_bytes(7, shapes, BF16, fp8=False) == 0
    assert 4e7 < linear.scratch_bytes(4096, shapes, BF16, fp8=False) < 5e7
