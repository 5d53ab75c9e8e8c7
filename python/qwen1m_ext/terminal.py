"""What the commands show on a terminal: sizes, the prefill bar, the closing line."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from .events import Progress
from .memory import format_bytes, peak_bytes
from .request import RequestMetrics


def format_seconds(seconds: float) -> str:
    """Seconds for a person: 3.2 s, 95 s, 12 min 05 s, 1 h 02 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class PrefillBar:
    """A progress bar fed by `on_progress`; the ETA is the engine's, which knows the work ahead.

    On a terminal it waits a second: the turns of a chat need none.
    """

    def __init__(self, total: int) -> None:
        terminal = sys.stderr.isatty()
        self._delay = 1.0 if terminal else 0.0  # seconds
        self._bar: tqdm[NoReturn] = tqdm(
            total=total,
            desc="prefill",
            unit="tok",
            file=sys.stderr,
            leave=True,
            delay=self._delay,
            mininterval=0.1 if terminal else 5.0,
            bar_format="{desc} {percentage:3.0f}%|{bar:32}| {n:,}/{total:,} tokens{postfix}",
        )

    def __enter__(self) -> PrefillBar:
        """Show the bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        self.close()

    def close(self) -> None:
        """The same, for those who cannot use `with`."""
        self._bar.close()

    @property
    def done(self) -> int:
        """Tokens of the last report."""
        return int(self._bar.n)

    def __call__(self, progress: Progress) -> None:
        """Take in a report of the engine."""
        text = f"{format_seconds(progress.elapsed)} elapsed"
        if progress.done < progress.total and progress.eta is not None:
            text += f", {format_seconds(progress.eta)} left"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total and progress.elapsed > self._delay:
            self._bar.refresh()


def closing_line(metrics: RequestMetrics) -> str:
    """Tokens, time to first token, speeds and peak memory of a request."""
    recall = "" if metrics.recall is None else f", recall {metrics.recall:.3f}"
    sparse = f", sparse{recall}" if metrics.sparse else ""
    cached = f" ({metrics.cached_tokens:,} cached)" if metrics.cached_tokens else ""
    parts = [
        f"prompt {metrics.prompt_tokens:,} tokens{cached}"
        f" in {format_seconds(metrics.prefill_seconds)}"
        f" ({metrics.prefill_tokens_per_second:,.0f} tok/s{sparse})",
        f"TTFT {format_seconds(metrics.time_to_first_token)}",
        f"output {metrics.output_tokens:,} tokens"
        + (f" ({metrics.decode_tokens_per_second:,.1f} tok/s)" if metrics.decode_seconds else ""),
        *(
            [f"{metrics.accepted_tokens:,} of {metrics.draft_tokens:,} guesses right"]
            if metrics.draft_tokens
            else []
        ),
        f"peak memory {format_bytes(peak_bytes())}",
    ]
    return " | ".join(parts)
