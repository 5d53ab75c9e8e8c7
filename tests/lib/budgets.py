"""Error budgets of every op against its float64 definition; docs/numerics.md states the same.

A value passes when |actual - expected| <= atol + rtol * |expected|. test_budgets.py checks that
the table of docs/numerics.md and this dict agree, so a budget cannot be widened silently.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """Allowed error of one output."""

    atol: float
    rtol: float


BUDGETS: dict[str, Budget] = {
    "rms_norm/fp32": Budget(0.0, 6e-7),
    "rms_norm/bf16": Budget(0.0, 2.0**-8),
    "swiglu/fp32": Budget(1e-30, 6e-7),
    "swiglu/bf16": Budget(1e-30, 2.0**-8),
    "qkv_rope_append/fp32": Budget(1e-6, 1e-6),
    "qkv_rope_append/bf16": Budget(1e-6, 2.0**-8),
    "attention/fp32": Budget(2e-5, 0.0),
    "attention/bf16": Budget(2e-5, 2.0**-8),
    "attention/bf16_products": Budget(6e-3, 2.0**-8),
    "lse/fp32": Budget(2e-5, 0.0),
    "lse/bf16": Budget(2e-5, 0.0),
    "lse/bf16_products": Budget(8e-3, 0.0),
    "sample_logprob/fp32": Budget(4e-6, 4e-7),
    "sample_logprob/bf16": Budget(4e-6, 4e-7),
    "estimate/fp32": Budget(2e-6, 1e-5),
    "estimate/bf16": Budget(2e-6, 1e-5),
    "estimate/bf16_products": Budget(2e-4, 2e-2),
    "sparse_dense/fp32": Budget(2e-6, 0.0),
    "attention/fp8_cache": Budget(4e-2, 0.0),
    "lse/fp8_cache": Budget(2e-2, 0.0),
    "rope_table/fp32": Budget(6e-8, 0.0),
    "golden/fp32": Budget(2e-5, 0.0),
    "golden/bf16": Budget(2.5e-2, 0.0),
}
