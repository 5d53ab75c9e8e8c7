"""docs/numerics.md states the budgets that the tests use."""

from __future__ import annotations

import re
from pathlib import Path

from lib.budgets import BUDGETS, Budget


def test_the_document_states_the_budgets() -> None:
    """Every row of the table is in BUDGETS with the same numbers, and the other way round."""
    text = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
    number = r"(0|\d[\de.-]*|2\^-\d+)"
    rows = re.findall(rf"^\| (\w+/\w+) \| {number} \| {number} \|", text, re.MULTILINE)
    value = lambda x: 2.0 ** int(x[2:]) if x.startswith("2^") else float(x)  # noqa: E731
    stated = {name: Budget(value(atol), value(rtol)) for name, atol, rtol in rows}
    assert stated == BUDGETS
