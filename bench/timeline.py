"""Who was at work when, as a picture: a lane each, time to the right. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Bars = Sequence[tuple[float, float]]  # (begin, end) in seconds


def draw(
    path: Path, title: str, lanes: Mapping[str, tuple[str, Bars]], begin: float, end: float
) -> None:
    """Save the bars of each lane (its colour and they) that lie in [begin, end]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.2 + 0.37 * len(lanes)
    figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
    for lane, (colour, bars) in enumerate(lanes.values()):
        inside = [
            (1e3 * (a - begin), max(1e3 * (b - a), 1e-3)) for a, b in bars if b > begin and a < end
        ]
        axes.broken_barh(inside, (lane - 0.35, 0.7), facecolors=colour, edgecolor="white", lw=0.4)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
