"""float8_e4m3fn with a scale, as the KV cache holds it."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0


def scale_of(values: Tensor) -> Tensor:
    """[heads] float32: the scale with which the largest value of each head becomes 448.

    values: [tokens, heads, D], at least one token.
    """
    return (values.double().abs().amax(dim=(0, 2)) / LARGEST).float()


def quantise(values: Tensor, scale: Tensor) -> Tensor:
    """e4m3(values / scale), the quotient in float32, to nearest even, saturating; NaN stays NaN."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """float64."""
    return codes.double() * scale.double()
