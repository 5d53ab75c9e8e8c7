"""Dense or sparse: which prompts are prefilled sparsely, and why.

`auto` is sparse only where that is both intended and faster: the checkpoint brings budgets that
somebody refined, and the prompt is longer than the published threshold and than the crossover that
`qwen1m sparsity crossover` measured on this machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .config import ModelConfig, read_json
from .errors import ConfigError
from .machine import cpu_name
from .request import ATTENTION_NAMES, AttentionName
from .sparse_config import (
    WINDOW_TOKENS,
    ExpectedKeys,
    SparseConfig,
    SparseSettings,
    load_settings,
    load_sparse_config,
    read_sparse_config,
)

CROSSOVER_FILE = "sparse_crossover.json"


@dataclass(frozen=True)
class Crossover:
    """From which prompt length on sparse prefill is faster; measured, see `crossover.py`."""

    tokens: int  # the two are equally fast here
    machine: str
    dtype: str
    threads: int
    samples: list[dict[str, float]]  # {"tokens", "dense_seconds", "sparse_seconds"}
    date: str
    command: str

    def save(self, directory: Path) -> Path:
        """Write `sparse_crossover.json` into a directory; returns its path."""
        path = directory / CROSSOVER_FILE
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


def load_crossover(directory: Path) -> Crossover | None:
    """The measurement beside a checkpoint; None if there is none.

    Raises:
        ConfigError: the file is not what `save` writes.
    """
    path = directory / CROSSOVER_FILE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        crossover = Crossover(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('Crossover.__init__() ')}") from None
    tokens = crossover.tokens
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ConfigError(f"{path}: tokens: expected an integer >= 0, got {tokens!r}")
    return crossover


@dataclass(frozen=True)
class PrefillPolicy:
    """What a loaded engine does with `attention="auto"`, and the budgets it uses."""

    default: AttentionName  # of requests that do not choose
    budgets: SparseConfig
    auto_tokens: int | None  # auto: longer prompts are sparse; None: none are
    settings: SparseSettings
    reason: str  # why, for a person

    @staticmethod
    def load(
        attention: AttentionName,
        model_dir: Path,
        config: ModelConfig,
        dtype: str,
        *,
        sparse_config: str | Path | None = None,
        settings: SparseSettings | None = None,
        plain: bool = False,
        chunk_tokens: int = WINDOW_TOKENS,
    ) -> PrefillPolicy:
        """Read the checkpoint's budgets and crossover.

        Args:
            attention: default of the engine's requests.
            model_dir: the checkpoint.
            config: of that checkpoint.
            dtype: that the engine computes in, such as "bfloat16"; a crossover measured in another
                one does not count.
            sparse_config: another file of budgets than the checkpoint's.
            settings: None: those that the budgets were refined with, or the published ones.
            plain: positions are plain RoPE.
            chunk_tokens: of the engine's prefill chunks.

        Raises:
            ConfigError: an unknown name, or a file that does not fit.
        """
        if attention not in ATTENTION_NAMES:
            raise ConfigError(
                f"attention: expected {', '.join(ATTENTION_NAMES)}, got {attention!r}"
            )
        if sparse_config is None:
            found = load_sparse_config(model_dir, config)
        else:
            found = read_sparse_config(Path(sparse_config), config)
        if settings is None and found:
            settings = load_settings(Path(found.source).parent)
        settings = settings or SparseSettings()
        auto_tokens, reason = _auto(model_dir, config, dtype)
        if found is None:
            reason = f"{model_dir} has no refined budgets (see `qwen1m sparsity refine`)"
        elif plain:
            reason = "positions are plain RoPE"
        elif chunk_tokens < settings.window_tokens:
            reason = (
                f"prefill_chunk_tokens {chunk_tokens} is less than a window of "
                f"{settings.window_tokens} tokens"
            )
        elif config.sparse_attention_enabled:
            return PrefillPolicy(attention, found, auto_tokens, settings, reason)
        else:
            reason = "config.json says sparse_attention_enabled: false"
        budgets = found or SparseConfig.default(config)
        return PrefillPolicy(attention, budgets, None, settings, reason)

    def expected_keys(self) -> ExpectedKeys:
        """What a row of sparse prefill is expected to meet."""
        return ExpectedKeys.of(self.budgets, self.settings, Path(self.budgets.source).parent)

    def describe(self) -> str:
        """The rule in a few words: dense, sparse, or the length beyond which it is sparse."""
        if self.default != "auto":
            return self.default
        return "dense" if self.auto_tokens is None else f"sparse beyond {self.auto_tokens} tokens"

    def is_sparse(self, wanted: str | None, prompt_tokens: int) -> bool:
        """Whether a prompt of this length is prefilled sparsely.

        Args:
            wanted: the request's own choice; None: the engine's.
            prompt_tokens: its length.
        """
        name = wanted or self.default
        if name == "auto":
            return self.auto_tokens is not None and prompt_tokens > self.auto_tokens
        return name == "sparse"


def _auto(model_dir: Path, config: ModelConfig, dtype: str) -> tuple[int, str]:
    """(prompts of more tokens are sparse, why) from the threshold and a measured crossover."""
    threshold = config.sparse_attention_threshold
    reason = f"sparse_attention_threshold is {threshold:,} tokens"
    crossover = load_crossover(model_dir)
    if crossover is None:
        return threshold, f"{reason}; no crossover was measured (see `qwen1m sparsity crossover`)"
    if (crossover.machine, crossover.dtype) != (cpu_name(), dtype):
        where = f"{crossover.machine}, {crossover.dtype}"
        return threshold, f"{reason}; the crossover of {where} does not count"
    reason += f"; the crossover measured here is {crossover.tokens:,} tokens"
    return max(threshold, crossover.tokens), reason
