"""Refinement of sparsity: budgets are raised, head by head, until attention recall is high enough.

The prompt runs as it will run later, sparsely. In every window and layer some rows are also
attended to densely; a head whose recall exp(lse_sparse - lse_full), averaged over the rows seen at
its present budgets, is below the threshold gets larger ones. Source: Qwen2.5-1M technical report
(arXiv:2501.15383), section 5.2, which leaves threshold and increments open.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import Batch, Segment
from .config import read_json
from .cost_model import CostModel
from .engine import Engine
from .errors import ConfigError, RequestError
from .events import Progress
from .sequence import AttentionPolicy
from .sparse_config import REPORT_FILE as REPORT_FILE
from .sparse_config import ExpectedKeys, HeadBudget, SparseConfig, SparseSettings
from .sparsity import (
    SELECTING_ROWS,
    RecallMeter,
    Selection,
    SparseAttention,
    SparsePrefill,
    Stored,
    pseudo_random,
)

START = (130, 100)
"""First (vertical_size, slash_size): little more than the forced columns and diagonals."""

GROWTH = 1.5
"""A step multiplies vertical_size or slash_size by it, whichever gains more recall per key."""

BLOCK_ROWS = 64
"""Rows of one sample; a window has `BLOCKS` of them at most."""

BLOCKS = 4


def grown(size: int) -> int:
    """The next larger size of a budget."""
    return math.ceil(size * GROWTH)


@dataclass
class RefineReport:
    """What a refinement has measured; also what a stopped one continues from."""

    threshold: float
    settings: dict[str, Any]  # of SparseSettings
    texts: list[dict[str, Any]]  # {"name", "tokens"}
    budgets: list[list[list[int]]]  # [layers][q_heads] (vertical_size, slash_size)
    recall: list[list[float]]  # [layers][q_heads] mean of the rows at these budgets
    rows: list[list[int]]  # how many rows that were
    columns: list[list[float]]  # keys that a row attends to, mean over the windows
    finished_texts: int = 0  # of the pass that runs
    raised: int = 0  # budgets raised in the pass that runs
    passes: int = 0  # complete ones
    finished: bool = False
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write it so that a reader sees the old state or the new one."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @staticmethod
    def load(path: Path) -> RefineReport:
        """Read it. Raises ConfigError if it is not what `save` writes."""
        values = read_json(path)
        names = {field.name for field in fields(RefineReport)}
        if set(values) != names:
            wrong = sorted(set(values) ^ names)
            raise ConfigError(f"{path}: expected the fields of a refinement, wrong: {wrong}")
        return RefineReport(**values)

    def config(self, source: str) -> SparseConfig:
        """The budgets in the form of sparse_attention_config.json, recall as their score."""
        return SparseConfig(
            tuple(
                tuple(
                    HeadBudget(v, s, min(1.0, round(score, 6)))
                    for (v, s), score in zip(budgets, recall, strict=True)
                )
                for budgets, recall in zip(self.budgets, self.recall, strict=True)
            ),
            source,
        )


Samples = Sequence[tuple[tuple[int, int], int, Tensor, Tensor]]
"""(segment, first token, q rows, their dense lse) of each sample of a window."""


class _RefiningAttention(SparseAttention):
    """Sparse attention that raises its own budgets."""

    def prepare(self, report: RefineReport) -> None:
        """Go on from what a report says."""
        self.threshold = report.threshold
        budgets = torch.tensor(report.budgets)  # [layers, q_heads, 2]
        self.v_size, self.s_size = (budgets[..., i].contiguous() for i in (0, 1))
        self.rows = torch.tensor(report.rows)
        self.total = torch.tensor(report.recall, dtype=torch.float64) * self.rows
        self.keys = torch.tensor(report.columns, dtype=torch.float64)
        self.raised = 0

    def judge(self, layer: int, stored: Stored, end: int, samples: Samples) -> Selection:
        """Raise the budgets of a layer until the window's scores give enough recall.

        Args:
            layer: which.
            stored: the layer's cache.
            end: of the window.
            samples: rows to judge by.

        Returns:
            The selection with the budgets reached.
        """
        while True:
            v_size, s_size = self.v_size[layer], self.s_size[layer]
            selection, recall, columns = self._try(stored, end, samples, v_size, s_size)
            count = self.rows[layer] + len(recall)
            total = self.total[layer] + recall.sum(0)
            full = (v_size >= end) & (s_size >= end)
            low = (total / count < self.threshold) & ~full
            if not low.any():
                break
            wider, longer = v_size.clone(), s_size.clone()
            for head in low.nonzero()[:, 0].tolist():
                wider[head], longer[head] = grown(int(v_size[head])), grown(int(s_size[head]))
            by_columns = self._gain(recall, columns, stored, end, samples, wider, s_size)
            by_diagonals = self._gain(recall, columns, stored, end, samples, v_size, longer)
            vertical = low & (by_columns >= by_diagonals) & (v_size < end)
            slash = low & (~vertical | (by_columns <= 0)) & (s_size < end)
            vertical |= low & ~slash
            self.v_size[layer] = torch.where(vertical, wider, v_size)
            self.s_size[layer] = torch.where(slash, longer, s_size)
            for statistics in (self.total, self.rows, self.keys):
                statistics[layer, low] = 0
            self.raised += int(low.sum())
        columns = columns.clamp(max=end)
        self.keys[layer] += (columns - self.keys[layer]) * (len(recall) / count)
        self.total[layer], self.rows[layer] = total, count
        return selection

    def _try(
        self, stored: Stored, end: int, samples: Samples, v_size: Tensor, s_size: Tensor
    ) -> tuple[Selection, Tensor, Tensor]:
        """(selection, [rows, q_heads] recall, [q_heads] keys per tile) of some budgets.

        The keys are those far from the prompt's beginning, so that a choice made in the first
        window is right in the last.
        """
        selection = self.select(end, v_size, s_size)
        recall = []
        for segment, token, q, full in samples:
            lse = torch.empty_like(full)
            self.apply(stored, selection, segment, token, q, torch.empty_like(q), lse)
            recall.append((lse - full).exp())
        return selection, torch.cat(recall).double(), selection.columns()

    def _gain(
        self,
        recall: Tensor,
        columns: Tensor,
        stored: Stored,
        end: int,
        samples: Samples,
        v_size: Tensor,
        s_size: Tensor,
    ) -> Tensor:
        """[q_heads] recall that other budgets gain per key that they add."""
        _, more, keys = self._try(stored, end, samples, v_size, s_size)
        return (more.mean(0) - recall.mean(0)) / (keys - columns).clamp(min=1)

    def _attend_window(
        self, layer: int, stored: Stored, begin: int, q: Tensor, out: Tensor, meter: RecallMeter
    ) -> None:
        end = begin + len(q)
        self.estimate(stored, q, end)
        segments = list(self.grid.segments(begin, end))
        samples = []
        for index in range(BLOCKS):  # one in every quarter of the window
            quarter = len(q) // BLOCKS
            token = begin + index * quarter + pseudo_random(begin, layer, index) % max(1, quarter)
            segment = next(s for s in segments if s[0] <= token < s[1])
            rows = q[token - begin : min(token + BLOCK_ROWS, segment[1]) - begin]
            samples.append((segment, token, rows, self.full_lse(stored, token, rows)))
        selection = self.judge(layer, stored, end, samples)
        for segment in segments:
            part = slice(segment[0] - begin, segment[1] - begin)
            self.apply(stored, selection, segment, segment[0], q[part], out[part], None)


class _JudgedBatch(Batch):
    """A batch of one segment, whose last layer is judged on the rows that are computed there."""

    def __init__(self, engine: Engine, segment: Segment, attention: _RefiningAttention) -> None:
        super().__init__(engine.rotary, engine.cache, [segment])
        self.end, self.attention = segment.end, attention

    def attend_rows(self, layer: int, q: Tensor, out: Tensor, rows: Tensor) -> None:
        """As `Batch`; the rows are the prompt's last ones."""
        super().attend_rows(layer, q, out, rows)
        attention, stored = self.attention, self.stored(layer, 0)
        *_, segment = attention.grid.segments(stored.begin, self.end)
        q = q[-(segment[1] - segment[0]) :]  # rows of one DCA chunk
        first = self.end - len(q)
        attention.estimate(stored, q, self.end)
        samples = [(segment, first, q, attention.full_lse(stored, first, q))]
        attention.judge(layer, stored, self.end, samples)


def refine(
    engine: Engine,
    texts: Sequence[tuple[str, list[int]]],
    report_path: Path,
    *,
    threshold: float = 0.95,
    start: tuple[int, int] = START,
    max_passes: int = 3,
    settings: SparseSettings = SparseSettings(),  # noqa: B008 - frozen
    on_progress: Callable[[Progress], None] | None = None,
) -> RefineReport:
    """Raise budgets until every head reaches the threshold; the state is saved after every text.

    All texts are gone through until a pass raises nothing, or `max_passes` are done. A run that was
    stopped continues with the text it was in if threshold, settings and texts are the same.

    Args:
        engine: a loaded model.
        texts: (name, token ids) of long texts like those of the later use.
        report_path: where the state lies.
        threshold: recall that every head has to reach, in (0, 1).
        start: first (vertical_size, slash_size); 30 columns count as 130, as in the files.
        max_passes: passes over the texts at most.
        settings: how columns and diagonals are chosen.
        on_progress: called after every layer; may raise.

    Raises:
        RequestError: an argument out of range, or a text that does not fit.
        ConfigError: `report_path` holds something else.
    """
    if not 0.0 < threshold < 1.0:
        raise RequestError(f"threshold: expected a number in (0, 1), got {threshold!r}")
    if not texts:
        raise RequestError("texts: expected at least one, got none")
    for name, ids in texts:
        if not 2 <= len(ids) <= engine.max_model_len:
            raise RequestError(
                f"text {name}: expected 2 to {engine.max_model_len} tokens, got {len(ids)}"
            )
    config = engine.config
    shape = (config.num_layers, config.num_q_heads)
    first = [HeadBudget(*start, 0.0).columns, start[1]]
    zeros = torch.zeros(shape).tolist()
    report = RefineReport(
        threshold,
        asdict(settings),
        [{"name": name, "tokens": len(ids)} for name, ids in texts],
        [[first] * shape[1]] * shape[0],
        zeros,
        torch.zeros(shape, dtype=torch.int64).tolist(),
        zeros,
    )
    if report_path.exists():
        old = RefineReport.load(report_path)
        same = ("threshold", "settings", "texts")
        if all(getattr(old, name) == getattr(report, name) for name in same):
            report = old
        else:
            raise ConfigError(
                f"{report_path}: expected a refinement with the same threshold, settings and "
                "texts, got another; remove the file to begin anew"
            )
    budgets = report.config("refinement")
    attention = _RefiningAttention(
        config, engine.dual_chunk, budgets, engine.max_model_len, settings
    )
    clock = time.perf_counter() - report.seconds
    while not report.finished:
        attention.prepare(report)
        for index in range(report.finished_texts, len(texts)):
            with torch.inference_mode():
                _run_text(engine, attention, texts[index][1], on_progress)
            _take(report, attention)
            report.finished_texts, report.seconds = index + 1, time.perf_counter() - clock
            report.save(report_path)
        report.passes += 1
        report.finished = report.raised == 0 or report.passes >= max_passes
        report.finished_texts, report.raised = 0, 0
        report.save(report_path)
    return report


def _take(report: RefineReport, attention: _RefiningAttention) -> None:
    """Note what the attention has measured."""
    report.budgets = torch.stack([attention.v_size, attention.s_size], -1).tolist()
    report.rows = attention.rows.tolist()
    report.recall = (attention.total / attention.rows.clamp(min=1)).tolist()
    report.columns = attention.keys.tolist()
    report.raised += attention.raised
    attention.raised = 0


def _run_text(
    engine: Engine,
    attention: _RefiningAttention,
    ids: list[int],
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Prefill one text, chunk by chunk, under the refining attention."""
    start, total = time.perf_counter(), len(ids)
    sparse = SparsePrefill.start(attention)
    policy = AttentionPolicy("refinement", attention.grid.window_tokens, attention.grid.border)
    temperature = engine.dual_chunk.temperature(total)

    def report(begin: int, end: int, share: float) -> None:
        if on_progress is None:
            return
        cost = CostModel(engine.config, ExpectedKeys(attention.mean_columns))  # budgets grow
        done = cost.prefill_seconds(0, begin, True) + share * cost.prefill_seconds(begin, end, True)
        elapsed = time.perf_counter() - start
        eta = elapsed * (cost.prefill_seconds(0, total, True) - done) / done
        on_progress(Progress(begin + int(share * (end - begin)), total, max(0.0, eta), elapsed))

    sequence = engine.cache.open()
    try:
        begin = 0
        while begin < total:
            end = policy.chunk_end(begin, begin + engine.chunk_tokens, total)
            sequence.append(end - begin)
            segment = Segment(sequence, begin, end, temperature, sparse)
            rows = torch.arange(end - begin)[-SELECTING_ROWS:]
            engine.model.forward(
                torch.tensor(ids[begin:end]),
                _JudgedBatch(engine, segment, attention),
                rows if end == total else rows[:0],
                lambda done, of: report(begin, end, done / of),  # noqa: B023
            )
            begin = end
    finally:
        engine.cache.close(sequence)
