"""Scales of a cache in fp8: one for K and one for V of every KV head of every layer.

They depend on the checkpoint alone: stored with it by `qwen1m quantize`, or found when the engine
starts. Scales from the first prompt that happens to come would make every later answer depend on
it, and a prompt of three words would set them for good.

They are powers of two, as those of fp8 weights: widening is then exact in bf16, so that prefill and
decode meet the same numbers. The largest value that was seen takes a quarter to half of the range.
What is larger later saturates; what is smaller loses nothing down to 2^-12 of it (e4m3 is a
floating-point format).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import Batch, Rotary, Segment
from .config import ModelConfig, read_json
from .errors import ConfigError, WeightsError
from .fp8 import SCALES, scale_for
from .kv_cache import KVCache
from .model import Qwen2Model

FILE_NAME = "kv_cache_scales.json"
"""In a checkpoint: {"k": [layers][kv_heads], "v": the same}, the exponents of the scales."""

HEADROOM = 2.0
"""Values up to so many times the largest that was seen do not saturate."""

PASSES, PASS_TOKENS = 8, 64
"""What is run to see keys and values: short passes, so that scales depend neither on the engine's
context length nor on its chunks."""


class _Watched(Batch):
    """A batch that notes the largest key and value of each layer and head."""

    def __init__(self, rotary: Rotary, cache: KVCache, segment: Segment) -> None:
        super().__init__(rotary, cache, [segment])
        self._k, self._v = cache.k, cache.v
        self._pages, self._tokens = torch.tensor(segment.sequence.pages), segment.end
        self.largest: list[Tensor] = []  # [2, kv_heads] float32: K, V

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """As `Batch`; the layer's keys and values are in the cache by now."""
        pools = self._k[layer], self._v[layer]
        self.largest.append(torch.stack([self._largest(pool) for pool in pools]))
        super().attend(layer, q, out)

    def _largest(self, pool: Tensor) -> Tensor:
        rows = pool[self._pages].transpose(1, 2).flatten(0, 1)[: self._tokens]
        return rows.float().abs().amax((0, 2))


def calibrate(model: Qwen2Model, rotary: Rotary, cache: KVCache, tokens: int) -> None:
    """Set the scales of an empty cache in fp8 by running tokens from all over the vocabulary.

    Args:
        model: the model.
        rotary: positions.
        cache: in fp8; its second set of pages holds the keys and values meanwhile.
        tokens: most that may be run: the context length.

    Raises:
        WeightsError: a key or value is not finite.
    """
    assert cache.k_scale is not None and cache.v_scale is not None, "a cache in fp8"
    count = min(PASS_TOKENS, tokens, model.workspace.chunk_tokens)
    vocab = model.config.vocab_size
    ids = torch.arange(PASSES * count) * round(0.618 * vocab) % vocab  # far from each other
    seen = []
    sequence = cache.open()
    try:
        sequence.append(count)
        for some in torch.split(ids, count):
            batch = _Watched(rotary, cache.unrounded(), Segment(sequence, 0, count, 1.0))
            with torch.inference_mode():
                model.forward(batch.put(some), batch)
            seen.append(torch.stack(batch.largest))
    finally:
        cache.close(sequence)
    largest = torch.stack(seen).amax(0)  # [layers, 2, kv_heads]
    if not largest.isfinite().all():
        layer = int((~largest.isfinite()).nonzero()[0, 0])
        raise WeightsError(
            f"kv_cache_dtype: fp8 needs finite keys and values, got {largest[layer].tolist()} as "
            f"the largest of the heads of layer {layer} (k, v)"
        )
    for scale, one in zip((cache.k_scale, cache.v_scale), largest.unbind(1), strict=True):
        scale.copy_(scale_for(HEADROOM * one))


def exponents(cache: KVCache) -> dict[str, list[list[int]]] | None:
    """The scales of a cache as exponents of two: {"k": [layers][kv_heads], "v": ...}; or None."""
    if cache.k_scale is None or cache.v_scale is None:
        return None
    both = {"k": cache.k_scale, "v": cache.v_scale}
    return {name: scale.cpu().log2().int().tolist() for name, scale in both.items()}


def store(cache: KVCache, model_dir: Path) -> None:
    """Write the scales of a cache in fp8 beside a checkpoint's weights."""
    unfinished = model_dir / f".{FILE_NAME}.unfinished"
    unfinished.write_text(json.dumps(exponents(cache)) + "\n", encoding="utf-8")
    os.replace(unfinished, model_dir / FILE_NAME)


def load(cache: KVCache, config: ModelConfig, model_dir: Path) -> bool:
    """Set the scales of a cache in fp8 to those stored with a checkpoint; False: there are none.

    Raises:
        ConfigError: the file does not fit the model.
    """
    path = model_dir / FILE_NAME
    if not path.exists():
        return False
    assert cache.k_scale is not None and cache.v_scale is not None, "a cache in fp8"
    fields = read_json(path)
    if set(fields) != {"k", "v"}:
        raise ConfigError(f"{path}: expected the fields k and v, got {sorted(fields)}")
    for name, scale in (("k", cache.k_scale), ("v", cache.v_scale)):
        scale.copy_(_parse(fields[name], config, f"{path}: {name}"))
    return True


def _parse(stored: Any, config: ModelConfig, what: str) -> Tensor:
    low, high = SCALES
    shape = (config.num_layers, config.num_kv_heads)
    try:
        found = torch.tensor(stored)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.dtype != torch.int64 or tuple(found.shape) != shape:
        raise ConfigError(f"{what}: expected {shape[0]} lists of {shape[1]} whole numbers")
    if int(found.min()) < low or int(found.max()) > high:
        raise ConfigError(
            f"{what}: expected exponents from {low} to {high}, got {int(found.min())} to "
            f"{int(found.max())}"
        )
    return torch.ldexp(torch.ones(shape), found.int())
