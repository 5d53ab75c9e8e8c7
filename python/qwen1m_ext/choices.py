"""What "auto" means, and what can be chosen instead: device, dtype, positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from . import ops
from .config import PLAIN_ROPE, DualChunkConfig, ModelConfig
from .device import CPU, CudaDevice, Device
from .errors import BackendError, ConfigError
from .fp8 import FP8

DTypeName = Literal["auto", "bfloat16", "float32"]
RopeName = Literal["auto", "dca", "plain"]
SpeculativeName = Literal["ngram"]
KVCacheName = Literal["auto", "fp8"]
KVOffloadName = Literal["host"]

log = logging.getLogger(__name__)


CAPABILITIES = ((8, 0), (9, 0))
"""Of the GPUs that kernels are compiled for: A100, H100 and H200."""


@dataclass(frozen=True)
class Wanted:
    """What an engine is asked to compute, as far as not every device can."""

    config: ModelConfig
    dtype: torch.dtype
    kv_dtype: torch.dtype
    sparse: bool = False

    @property
    def ops(self) -> list[str]:
        """The operators that it takes."""

        def taken(op: str) -> bool:
            return (
                self.kv_dtype == FP8 if op == "widen_pages" else self.sparse or "sparse" not in op
            )

        return [op for op in ops.OP_NAMES if taken(op)]


def choose_device(device: str | Device, wanted: Wanted) -> Device:
    """The device that is computed on; "auto": a GPU if there is one that can.

    Raises:
        ConfigError: not understood.
        BackendError: no GPU, or it cannot compute what is wanted; the text says why.
    """
    if isinstance(device, Device):
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cpu":
        return CPU
    missing = missing_gpu()
    reasons = [missing] if missing else list(_not_on_cuda(wanted))
    if not reasons:
        return CudaDevice()
    if device == "cuda":
        raise BackendError("device: cuda was asked for, but " + "; ".join(reasons))
    if not missing:  # a GPU that stands idle is worth a word
        log.warning("computing on the CPU, because %s", "; ".join(reasons))
    return CPU


def missing_gpu() -> str | None:
    """Why nothing at all can run on a GPU here; None: it can."""
    if not ops.cuda_kernels():
        return "this package was built without CUDA kernels"
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        return f"torch {torch.__version__} {built}"
    capability = torch.cuda.get_device_capability()
    if capability not in CAPABILITIES:
        expected = " or ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        return "expected a GPU of capability {}, got {}.{}".format(expected, *capability)
    return None


def _not_on_cuda(wanted: Wanted) -> Iterator[str]:
    """What the kernels do not do of it."""
    config = wanted.config
    if absent := [op for op in wanted.ops if op not in ops.cuda_kernels()]:
        yield f"there is no CUDA kernel for {', '.join(absent)}"
    if wanted.dtype != torch.bfloat16:
        name = str(wanted.dtype).removeprefix("torch.")
        yield f"the kernels compute in bfloat16, not in {name} (dtype)"
    if config.head_dim not in (64, 128):
        yield f"the kernels take a head_dim of 64 or 128, not {config.head_dim}"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        yield "the kernels read rows in vectors of 8, which hidden or intermediate size do not fill"
    if wanted.config.quantised and torch.cuda.get_device_capability() < (8, 9):
        yield "fp8 weights need a GPU with fp8 products (capability 8.9 or newer)"


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
