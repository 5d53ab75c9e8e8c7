"""The progress bar on a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from qwen1m_ext import terminal
from qwen1m_ext.events import Progress


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def shown(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, elapsed: float) -> str:
    """What is on the screen after a prefill of 10 tokens that says it took `elapsed` seconds."""
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    with terminal.PrefillBar(10) as bar:
        bar(Progress(10, 10, 0.0, elapsed))
    return screen.getvalue()


def test_a_short_prefill_shows_no_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, True, 0.3) == ""


def test_a_long_prefill_shows_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "10/10 tokens, 3.0 s elapsed" in shown(monkeypatch, True, 3.0)


def test_a_file_gets_the_last_state_always(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, False, 0.3)
    assert "10/10 tokens, 0.3 s elapsed" in text and text.endswith("\n")
