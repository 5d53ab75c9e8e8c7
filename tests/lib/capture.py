"""What a CUDA graph may hold, checked on the CPU: a dispatch mode that sees every op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a stream would have to be waited for, or whose result has a size that only the device knows.
SYNCHRONISING = (
    "aten._local_scalar_dense", "aten.item", "aten.equal", "aten.is_nonzero", "aten.nonzero",
    "aten.masked_select", "aten.unique", "aten._unique2", "aten.repeat_interleave", "aten._to_copy",
)  # fmt: skip
TO_THE_HOST = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Recorder(TorchDispatchMode):
    """Notes every op, and of which a result lies in memory that was not there before, or waits."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.problems: list[str] = []
        self.tape: list[tuple[Any, Any, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        known = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        self.ops.append(name)
        self.tape.append((func, args, kwargs))
        if name in SYNCHRONISING:
            self.problems.append(f"{name} waits")
        if any(isinstance(t, Tensor) and storage(t) not in known for t in tree_leaves(result)):
            self.problems.append(f"{name} allocates")
        return result


def storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory."""
    return tensor.untyped_storage()._cdata


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Ops of the body; a tensor that becomes a number is a problem too."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for name in TO_THE_HOST:
            plain = getattr(Tensor, name)

            def closed(self: Tensor, *args: Any, _name: str = name, _plain: Any = plain) -> Any:
                recorder.problems.append(f"Tensor.{_name} reads on the host")
                return _plain(self, *args)

            patch.setattr(Tensor, name, closed)
        with torch.inference_mode(), recorder:
            yield recorder


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same object, dataclasses and lists included, with other tensors in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: mapped(one, change) for name, one in vars(value).items()}
        return replace(value, **fields)
    return value
