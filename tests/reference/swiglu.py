"""Gated linear unit with SiLU (arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * intermediate], gate columns first -> [tokens, intermediate] float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up
