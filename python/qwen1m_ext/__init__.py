"""One million tokens on one GPU: the engine for Qwen2.5-7B/14B-Instruct-1M.

>>> from qwen1m_ext import LLM, SamplingParams
>>> llm = LLM("path/to/checkpoint")
>>> llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].outputs[0].text
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM as LLM
    from .request import RequestOutput as RequestOutput
    from .request import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "demo_model_path"]

_LAZY = {"LLM": "llm", "RequestOutput": "request", "SamplingParams": "request"}


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first used, so that `qwen1m --help` is instant."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def demo_model_path() -> Path:
    """Directory of the demo checkpoint that comes with the package (see recipes/tiny)."""
    return Path(__file__).resolve().parent / "demo_model"
