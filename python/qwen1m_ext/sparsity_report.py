"""`qwen1m sparsity report`: recall per layer and head, keys kept, and the speed-up to expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .config import DualChunkConfig
from .errors import BackendError
from .refine import RefineReport
from .sparse_config import WINDOW_TOKENS
from .sparsity import SELECTING_ROWS, WindowGrid

LENGTHS = (32_768, 131_072, 524_288, 1_000_000)


def predicted_speed_up(report: RefineReport, dual_chunk: DualChunkConfig, tokens: int) -> float:
    """Dense pairs over the pairs that sparse prefill computes, the selection included.

    Of the layers that are sparse (all but the last), at the measured keys per row; a ratio of work,
    not of time.
    """
    sparse = 0.0
    layers = report.columns[:-1]
    for layer in layers:
        for columns in layer:
            short = min(columns, tokens)
            sparse += short * (short + 1) / 2 + (tokens - short) * columns
    grid = WindowGrid(dual_chunk, int(report.settings.get("window_tokens", WINDOW_TOKENS)))
    selection = sum(SELECTING_ROWS * end for _, end in grid.windows(0, tokens))
    heads = sum(len(layer) for layer in layers)
    dense = tokens * (tokens + 1) / 2
    return heads * dense / (sparse + heads * selection) if heads else 1.0


def report_lines(report: RefineReport, dual_chunk: DualChunkConfig) -> Iterator[str]:
    """The report as text, a line per layer."""
    tokens = [text["tokens"] for text in report.texts]
    state = "finished" if report.finished else "NOT FINISHED"
    yield (
        f"{state} after {report.passes} passes over {len(tokens)} texts of "
        f"{min(tokens):,} to {max(tokens):,} tokens; recall wanted: {report.threshold:g}"
    )
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    yield f"selection: {settings}"
    yield "layer  recall mean   lowest (head)    keys per row   budgets (columns + diagonals)"
    for index, (recall, columns, budgets) in enumerate(
        zip(report.recall, report.columns, report.budgets, strict=True)
    ):
        lowest = min(range(len(recall)), key=lambda head: recall[head])
        pairs = sorted({(v, s) for v, s in budgets})
        some = " ".join(f"{v}+{s}" for v, s in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
        last = "  (requested rows only; attended densely)" * (index == len(report.recall) - 1)
        yield (
            f"{index:5}  {sum(recall) / len(recall):11.4f}  {recall[lowest]:7.4f} ({lowest:3})  "
            f"{sum(columns) / len(columns):13,.0f}   {some}{last}"
        )
    longest = max(tokens)
    yield "tokens      predicted speed-up of attention (ratio of pairs)"
    for length in sorted({longest, *LENGTHS}):
        beyond = "" if length <= longest else "  (keys per row as measured at the lengths above)"
        yield f"{length:>9,}   {predicted_speed_up(report, dual_chunk, length):8.1f}x{beyond}"


def draw(report: RefineReport, path: Path) -> None:
    """Recall and keys per row of every layer and head as a PNG.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError(
            "report: matplotlib is needed to draw: pip install 'qwen1m_ext[plot]'"
        ) from None
    layers, heads = len(report.recall), len(report.recall[0])
    size = (max(7.0, 0.55 * heads), 1.8 + max(1.6, 0.22 * layers))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for panel, values, title, limits, colours in (
        (panels[0], report.recall, "attention recall", (min(0.8, report.threshold), 1.0), "RdYlGn"),
        (panels[1], report.columns, "keys per row", (0.0, None), "viridis"),
    ):
        image = panel.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
        panel.set(title=title, xlabel="query head", ylabel="layer")
        panel.set_xticks(range(0, heads, max(1, heads // 8)))
        panel.set_yticks(range(0, layers, max(1, layers // 12)))
        figure.colorbar(image, ax=panel)
    figure.savefig(path, dpi=120)
