"""One comparison for all tests: non-finite positions first, then error against a named budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.budgets import BUDGETS

used: dict[str, float] = {}
"""Largest error / allowed error met so far, per budget; conftest.py prints it at the end."""


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64 (0 for empty tensors, nan if either holds one)."""
    difference = (actual.double() - expected.double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def assert_close(
    actual: Tensor, expected: Tensor, budget: str, name: str = "out", factor: float = 1.0
) -> None:
    """Check `actual` against `expected` within BUDGETS[budget].

    Args:
        actual: any float dtype and device.
        expected: same shape; usually float64.
        budget: a key of BUDGETS, "<op>/<dtype>".
        name: what the tensors are, for the message.
        factor: multiplies the absolute part of the budget.

    Raises:
        AssertionError: names the worst coordinate, both values there and the allowed error.
    """
    atol, rtol = BUDGETS[budget]
    atol *= factor
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = kind(actual) != kind(expected)
        if differs.any():
            at = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind.__name__} differs at {int(differs.sum())} of {differs.numel()} "
                f"places, first at {at}: got {actual[at].item()}, expected {expected[at].item()}"
            )
    finite = torch.isfinite(expected)
    error = torch.where(finite, actual - expected, 0.0).abs()
    allowed = torch.where(finite, atol + rtol * expected.abs(), 1.0)
    if not error.numel():
        return
    share = error / allowed.clamp_min(1e-300)  # the floor keeps 0 / 0 at 0
    used[budget] = max(used.get(budget, 0.0), share.max().item())
    if (error <= allowed).all():
        return
    worst = int(share.argmax())
    at = tuple(int(x) for x in torch.unravel_index(torch.tensor(worst), error.shape))
    raise AssertionError(
        f"{name}: {int((error > allowed).sum())} of {error.numel()} values exceed the budget "
        f"{budget} (atol {atol:g}, rtol {rtol:g}); worst at {at}: got {actual[at].item():.9g}, "
        f"expected {expected[at].item():.9g}, error {error[at].item():.3g}, "
        f"allowed {allowed[at].item():.3g}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "out") -> None:
    """Check that two tensors hold the same bits (so that -0, 0 and NaN payloads count)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(view) != expected.contiguous().view(view)
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: bits differ at {int(differs.sum())} of {differs.numel()} places, first at "
            f"{at}: {actual[at].item()!r} and {expected[at].item()!r}"
        )
