"""Negative tests: an op refuses a bad argument and leaves its outputs alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch


def refuses(
    op: Callable[..., None],
    arguments: dict[str, Any],
    change: dict[str, Callable[[Any], Any]],
    words: tuple[str, ...],
) -> None:
    """Check that `op` works with `arguments` and raises when some of them are changed.

    Args:
        op: the typed wrapper.
        arguments: good arguments; called first, so that a refusal is due to the change alone.
        change: argument name -> function from the good to the bad value.
        words: what the message must hold: argument, expectation, value.
    """
    op(**arguments)
    bad = {name: change.get(name, lambda value: value)(arguments[name]) for name in arguments}
    before = {name: value.clone() for name, value in bad.items() if torch.is_tensor(value)}
    with pytest.raises(RuntimeError) as error:
        op(**bad)
    text = str(error.value)
    for word in words:
        # A whole word or number: "4" is not found in "64".
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?![\w])", text), f"{word!r} not in {text!r}"
    for name, value in before.items():
        now = bad[name]
        if value.element_size() == 1:  # fp8: compared as bytes
            now, value = now.view(torch.uint8), value.view(torch.uint8)
        assert torch.equal(now.nan_to_num(), value.nan_to_num()), f"{name} was written"
