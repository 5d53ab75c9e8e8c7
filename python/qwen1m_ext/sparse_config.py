"""`sparse_attention_config.json`: how many columns and diagonals each head may select.

The file lies beside `config.json`. It is a list over layers; each entry maps the index of a query
head, as a string, to `["vertical_and_slash", vertical_size, slash_size, score]`. This is the format
that the published Qwen2.5-1M configurations and vLLM use; `qwen1m sparsity refine` writes it too.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from .config import ModelConfig, read_json
from .errors import ConfigError

FILE_NAME = "sparse_attention_config.json"
REPORT_FILE = "sparse_attention_report.json"  # of `qwen1m sparsity refine`, beside it
PATTERN = "vertical_and_slash"

DEFAULT_BUDGET = (1000, 6096)
"""(vertical_size, slash_size) without a file: what most heads of both published files have."""

PUBLISHED_MINIMUM = 30
PUBLISHED_MINIMUM_MEANS = 130
"""A vertical_size of 30 means 130, as in vLLM and SGLang, whose published files rely on it."""

_MAX_SIZE = 1 << 30
_MAX_SCORE = 1.001  # the published files have 1.00005: a ratio of rounded sums


Positions = Literal["critical", "real"]
POSITIONS: tuple[Positions, ...] = ("critical", "real")

WINDOW_TOKENS = 32_768
"""Windows lie on this absolute grid, so that results do not depend on how a prompt is scheduled."""


@dataclass(frozen=True)
class SparseSettings:
    """How columns and diagonals are chosen. The defaults are those of the published models.

    Raises:
        ConfigError: a value that is not possible.
    """

    positions: Positions = "critical"  # "critical": continuous; "real": those of attention itself
    share_group: bool = False  # one selection for the query heads of a key/value head
    tile_tokens: int = 128  # rows that load the same keys: a multiple of 64 up to 512
    window_tokens: int = WINDOW_TOKENS

    def __post_init__(self) -> None:
        """Check every value."""
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions: expected critical or real, got {self.positions!r}")
        if not isinstance(self.share_group, bool):
            raise ConfigError(f"share_group: expected True or False, got {self.share_group!r}")
        if self.tile_tokens not in range(64, 513, 64):
            raise ConfigError(
                f"tile_tokens: expected a multiple of 64 up to 512, got {self.tile_tokens!r}"
            )
        if not isinstance(self.window_tokens, int) or self.window_tokens < 1:
            raise ConfigError(
                f"window_tokens: expected an integer >= 1, got {self.window_tokens!r}"
            )


@dataclass(frozen=True)
class HeadBudget:
    """What one query head may select in each segment of a prompt."""

    vertical_size: int  # columns: keys that all rows attend to, the first 30 keys among them
    slash_size: int  # diagonals: distances that all rows attend at, 0 to 99 among them
    score: float  # attention recall that the budgets were accepted with, 0 to 1

    @property
    def columns(self) -> int:
        """vertical_size with the published special case applied."""
        small = self.vertical_size == PUBLISHED_MINIMUM
        return PUBLISHED_MINIMUM_MEANS if small else self.vertical_size


@dataclass(frozen=True)
class SparseConfig:
    """Budgets of every layer and query head, and where they come from."""

    layers: tuple[tuple[HeadBudget, ...], ...]  # [layers][q_heads]
    source: str  # path of the file, or what the default is

    @staticmethod
    def default(config: ModelConfig) -> SparseConfig:
        """`DEFAULT_BUDGET` for every head; its score is 0, as nothing was measured."""
        budget = HeadBudget(*DEFAULT_BUDGET, 0.0)
        layer = (budget,) * config.num_q_heads
        text = "the default budgets {} + {}".format(*DEFAULT_BUDGET)
        return SparseConfig((layer,) * config.num_layers, text)

    @property
    def most_columns(self) -> int:
        """The largest budget of columns of any head."""
        return max(budget.columns for heads in self.layers for budget in heads)

    def save(self, path: Path) -> None:
        """Write the file; a reader sees the old one or the new one, never half of it."""
        layers = [
            {str(h): [PATTERN, b.vertical_size, b.slash_size, b.score] for h, b in enumerate(heads)}
            for heads in self.layers
        ]
        text = "[\n" + ",\n".join(json.dumps(layer) for layer in layers) + "\n]\n"
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def load_settings(folder: Path) -> SparseSettings | None:
    """The settings that the budgets in a folder were refined with; None: no refinement is noted.

    Raises:
        ConfigError: the report of the refinement is damaged.
    """
    path = folder / REPORT_FILE
    if not path.exists():
        return None
    values = read_json(path).get("settings")
    if not isinstance(values, dict) or set(values) - {f.name for f in fields(SparseSettings)}:
        raise ConfigError(f"{path}: settings: expected those of SparseSettings, got {values!r}")
    try:
        return SparseSettings(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


FORCED_DIAGONALS = 100
"""Distances 0 to 99, which every row attends at: one run."""

DILATION = 3.0
"""Keys loaded per selected diagonal if no refinement has measured them: neighbours share theirs."""


@dataclass(frozen=True)
class ExpectedKeys:
    """How many keys a row of sparse attention is expected to meet, mean over layers and heads.

    For predictions only. Far diagonals lie anywhere before the row and load a tile's worth of keys
    each; where they overlap, fewer: of e keys, those that would span y without overlap meet
    e (1 - exp(-y / e)). So a row far behind the beginning meets more keys than one near it.
    """

    near: float  # keys that every row meets
    far: tuple[tuple[float, float], ...] = ()  # (y, share of the heads)
    window_tokens: int = WINDOW_TOKENS

    def far_pairs(self, begin: int, end: int) -> float:
        """(query, key) pairs of the tokens [begin, end) beside the near ones, per head."""
        pairs = 0.0
        while begin < end:
            stop = min(end, (begin // self.window_tokens + 1) * self.window_tokens)
            met = sum(share * -math.expm1(-y / stop) for y, share in self.far)
            pairs += met * (stop * stop - begin * begin) / 2
            begin = stop
        return pairs

    @staticmethod
    def of(budgets: SparseConfig, settings: SparseSettings, folder: Path) -> ExpectedKeys:
        """From budgets, and from the keys that their refinement measured if it is in `folder`."""
        heads = [b for layer in budgets.layers for b in layer]
        window = settings.window_tokens
        path = folder / REPORT_FILE
        report = read_json(path) if path.exists() else {}
        try:
            measured = [float(c) for layer in report["columns"] for c in layer]
            tokens = max(int(text["tokens"]) for text in report["texts"])
        except (KeyError, TypeError, ValueError):
            measured, tokens = [], 0
        if len(measured) != len(heads) or tokens < 1:
            near = sum(b.columns + DILATION * b.slash_size for b in heads) / len(heads)
            return ExpectedKeys(near, (), window)
        ends = [*range(window, tokens, window), tokens]
        near, far = 0.0, []
        for budget, columns in zip(heads, measured, strict=True):
            own = budget.columns + min(budget.slash_size, FORCED_DIAGONALS) + settings.tile_tokens
            near += own / len(heads)
            if columns > own:
                far.append((_span(columns - own, ends), 1 / len(heads)))
        return ExpectedKeys(near, tuple(far), window)


def _span(columns: float, ends: list[int]) -> float:
    """The y of `ExpectedKeys` that gives so many keys, mean over windows with these ends."""
    low, high = 0.0, 64.0 * max(ends)
    for _ in range(50):
        y = (low + high) / 2
        mean = sum(-e * math.expm1(-y / e) for e in ends) / len(ends)
        low, high = (y, high) if mean < columns else (low, y)
    return low


def load_sparse_config(model_dir: str | Path, config: ModelConfig) -> SparseConfig | None:
    """Read the budgets of a checkpoint directory; None if it has no such file.

    Raises:
        ConfigError: not JSON, not one entry per layer and query head, another pattern, or a size or
            score out of range.
    """
    path = Path(model_dir) / FILE_NAME
    return read_sparse_config(path, config) if path.exists() else None


def read_sparse_config(path: Path, config: ModelConfig) -> SparseConfig:
    """Read budgets from any file; raises ConfigError as `load_sparse_config`, also if missing."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(layers, list) or len(layers) != config.num_layers:
        got = f"a list of {len(layers)}" if isinstance(layers, list) else type(layers).__name__
        raise ConfigError(f"{path}: expected a list of {config.num_layers} layers, got {got}")
    return SparseConfig(
        tuple(_read_layer(f"{path}: layer {i}", x, config) for i, x in enumerate(layers)),
        str(path),
    )


def _read_layer(where: str, layer: object, config: ModelConfig) -> tuple[HeadBudget, ...]:
    """Check the entry of one layer: every query head once, and nothing else."""
    names = [str(head) for head in range(config.num_q_heads)]
    if not isinstance(layer, dict) or set(layer) != set(names):
        got = sorted(layer) if isinstance(layer, dict) else type(layer).__name__
        raise ConfigError(
            f'{where}: expected an object with the heads "0" to "{len(names) - 1}", '
            f"got {str(got)[:200]}"
        )
    return tuple(_read_head(f"{where}, head {name}", layer[name]) for name in names)


def _read_head(where: str, entry: object) -> HeadBudget:
    expected = f'["{PATTERN}", vertical_size, slash_size, score]'
    if not isinstance(entry, list) or len(entry) != 4:
        raise ConfigError(f"{where}: expected {expected}, got {json.dumps(entry)[:200]}")
    pattern, vertical, slash, score = entry
    if pattern != PATTERN:
        raise ConfigError(
            f'{where}: pattern: expected "{PATTERN}" (no other is implemented), '
            f"got {json.dumps(pattern)[:200]}"
        )
    for name, size in (("vertical_size", vertical), ("slash_size", slash)):
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MAX_SIZE:
            raise ConfigError(
                f"{where}: {name}: expected an integer in [1, {_MAX_SIZE}], "
                f"got {json.dumps(size)[:200]}"
            )
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if not number or not 0.0 <= score <= _MAX_SCORE:  # false for a NaN
        raise ConfigError(
            f"{where}: score: expected a number in [0, 1], got {json.dumps(score)[:200]}"
        )
    return HeadBudget(vertical, slash, float(score))
