"""What "auto" means, and what can be chosen instead: device, dtype, positions."""

from __future__ import annotations

from typing import Literal

import torch

from . import ops
from .config import PLAIN_ROPE, DualChunkConfig, ModelConfig
from .errors import BackendError, ConfigError
from .fp8 import FP8

DTypeName = Literal["auto", "bfloat16", "float32"]
RopeName = Literal["auto", "dca", "plain"]
SpeculativeName = Literal["ngram"]
KVCacheName = Literal["auto", "fp8"]
KVOffloadName = Literal["host"]


def choose_device(device: str) -> str:
    """The device that is computed on. Raises ConfigError, or BackendError without kernels."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda":
        # CUDA counts only when every op of the model has a kernel for it
        raise BackendError(
            "device: cuda was asked for, but this version has no CUDA kernels for "
            + ", ".join(op for op in ops.OP_NAMES if op not in ops.cuda_kernels())
        )
    return "cpu"


def choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The dtype of weights, activations and cache. Raises ConfigError."""
    if name == "auto":
        if config.dtype == torch.float16:
            raise ConfigError(
                "dtype: the checkpoint is float16, which is not computed in; expected "
                'dtype="bfloat16" or "float32" to be chosen, got "auto"'
            )
        return config.dtype
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype: expected auto, bfloat16 or float32, got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of cached keys and values beside activations in `dtype`. Raises ConfigError."""
    if name not in ("auto", "fp8"):
        raise ConfigError(f"kv_cache_dtype: expected auto or fp8, got {name!r}")
    return FP8 if name == "fp8" else dtype


def choose_rope(name: str, config: ModelConfig, where: str) -> DualChunkConfig:
    """The position rule of a model loaded from `where`. Raises ConfigError."""
    if name not in ("auto", "dca", "plain"):
        raise ConfigError(f"rope: expected auto, dca or plain, got {name!r}")
    if name == "dca" and config.dual_chunk.is_plain:
        raise ConfigError(
            f"rope: dca was asked for, but {where}/config.json has no dual_chunk_attention_config"
        )
    return PLAIN_ROPE if name == "plain" else config.dual_chunk
