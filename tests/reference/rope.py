"""Rotary position embedding with GPT-NeoX pairs (d, d + D/2) (arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(theta: float, head_dim: int, rows: int) -> Tensor:
    """(cos, sin) of every position: [rows, head_dim / 2, 2] float64.

    The phase is a float32 product, as the models were trained and as the public engines compute
    it; the float32 rounding of position times frequency is part of the definition (0.0089 rad at
    position 262144). Cosine and sine of that phase are exact.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponent
    phase = torch.arange(rows, dtype=torch.float32)[:, None] * inv_freq
    return torch.stack((phase.double().cos(), phase.double().sin()), dim=-1)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [..., D] by the table rows cos_sin [..., D/2, 2] (broadcast), in float64."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos_sin.double().unbind(-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
