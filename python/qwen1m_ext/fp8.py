"""Matrices in fp8 (e4m3) with one power of two per row: half the bytes of bf16.

A power of two costs no accuracy, since a floating-point format is as precise at any scale, and it
makes widening exact: the bf16 matrix that is multiplied with is `data * scale` to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite number of e4m3."""

SCALES = (-100, 7)
"""Exponents that a scale may have: `dequantise` stays in the range of bf16, and no weight that a
model computes with is out of reach (57,344)."""


@dataclass(frozen=True)
class Fp8Matrix:
    """`data * scale`, a matrix [out, in]."""

    data: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [out, 1] float32, powers of two

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.data.shape

    def __getitem__(self, rows: slice) -> Fp8Matrix:
        """Some rows, without a copy."""
        return Fp8Matrix(self.data[rows], self.scale[rows])

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix in bf16 or fp32, exactly."""
        return widen(self.data, self.scale).to(dtype)


def widen(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes * scale` in bf16, exactly, for finite e4m3 numbers and scales that are powers of two.

    The shapes broadcast.
    """
    # bf16 has e4m3's bits one place to the right of the sign, with another bias: moving them
    # and multiplying is ten times as fast as torch's conversion. 2^120 = 2^(127 - 7).
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 4
    bits &= -0x7810  # 0x87F0: the sign, and the seven bits behind it
    wide = bits.view(torch.bfloat16)
    wide *= (scale * 2.0**120).bfloat16()
    return wide


def scale_for(largest: Tensor) -> Tensor:
    """The least powers of two that bring numbers of this size to at most 448; 1 for zeros."""
    fraction, exponent = torch.frexp(largest / LARGEST)
    exponent -= (fraction == 0.5).int()  # already a power of two
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(*SCALES))
    scale[largest == 0] = 1
    return scale


def quantise(matrix: Tensor) -> Fp8Matrix:
    """Round a matrix [out, in] to the nearest numbers of e4m3, row by row.

    The scale of a row is the least power of two that brings its largest value to at most 448.

    Raises:
        ValueError: a value is infinite, NaN, or larger than 57,344.
    """
    matrix = matrix.float()
    largest = matrix.abs().amax(1, keepdim=True)
    limit = LARGEST * 2 ** SCALES[1]
    if not bool((largest <= limit).all()):
        raise ValueError(f"expected numbers of at most {limit:.0f}, got {float(largest.max())}")
    scale = scale_for(largest)
    return Fp8Matrix((matrix / scale).to(FP8), scale)


def fault(matrix: Fp8Matrix) -> str | None:
    """What is wrong with a stored matrix, or None: a NaN, or a scale that is no power of two."""
    scale = matrix.scale
    fraction, exponent = torch.frexp(scale)  # a power of two is 0.5 * 2^exponent
    low, high = SCALES
    bad = (fraction != 0.5) | (exponent <= low) | (exponent > high + 1)
    if bad.any():
        return (
            f"weight_scale: expected powers of two from 2^{low} to 2^{high}, "
            f"got {float(scale[bad][0])!r}"
        )
    # e4m3 has one NaN per sign: 0x7F is the largest int8, 0xFF the largest uint8
    if (
        int(matrix.data.view(torch.int8).max()) == 127
        or int(matrix.data.view(torch.uint8).max()) == 255
    ):
        return "expected numbers, got NaN"
    return None
