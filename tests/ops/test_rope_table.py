"""The rotary table that the ops read."""

from __future__ import annotations

import pytest
import torch

from lib.compare import assert_close
from qwen1m_ext.attention import build_rope_table
from reference.rope import rope_table as reference


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 64), (1e7, 128), (5e5, 80)])
def test_matches_definition(theta: float, head_dim: int) -> None:
    """Float32 phases, cosine and sine exact to float32, over a block border of the builder."""
    assert_close(build_rope_table(theta, head_dim, 66_000), reference(theta, head_dim, 66_000),
                 "rope_table/fp32", "table")  # fmt: skip


def test_phase_is_formed_in_float32() -> None:
    """At Qwen's largest position the float32 phase is 0.009 rad off: the models were trained so."""
    row = build_rope_table(1e7, 128, 262_145)[262_144]
    exponent = torch.arange(0, 128, 2).double() / 128
    exact = (262_144 / 1e7**exponent).cos()
    assert 1e-3 < (row[:, 0].double() - exact).abs().max() < 2e-2
