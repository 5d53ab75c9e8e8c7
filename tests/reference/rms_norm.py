"""Root-mean-square normalisation (arXiv:1910.07467), with the residual addition in front."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Normalise rows; the residual is rounded to its dtype before it is read again.

    Args:
        x: [tokens, hidden], any float dtype.
        weight: [hidden].
        eps: added to the mean of squares.
        residual: [tokens, hidden] of x's dtype, or None.

    Returns:
        (out float64, new residual in x's dtype or None).
    """
    if residual is not None:
        residual = (residual.double() + x.double()).to(x.dtype)
    row = (x if residual is None else residual).double()
    rms = torch.sqrt(row.square().mean(-1, keepdim=True) + eps)
    return row / rms * weight.double(), residual
