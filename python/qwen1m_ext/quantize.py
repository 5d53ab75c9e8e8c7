"""`qwen1m quantize`: a checkpoint with fp8 linear layers, written all or not at all.

The new directory is built beside its place and renamed when everything in it is on the disk: a
crash leaves no half checkpoint under its name. Embedding, head, norms and biases become bf16.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import kv_scales
from .config import FP8_QUANTIZATION, load_config, read_json
from .engine import Engine
from .errors import ConfigError, MemoryBudgetError, WeightsError
from .fp8 import quantise
from .memory import format_bytes
from .weights import expected_shapes, is_linear, stored_tensors, weight_bytes

SHARD_BYTES = 2 << 30
"""Largest file, and the most that is held in memory."""

_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}

OnTensor = Callable[[int], object]
"""Called with the parameters of a tensor when it is done."""


def quantize_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    on_tensor: OnTensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an fp8 copy of a checkpoint.

    Args:
        model_dir: a checkpoint that is not quantised.
        out_dir: the new directory.
        on_tensor: progress.
        shard_bytes: largest file.

    Raises:
        ConfigError: `out_dir` exists, or the checkpoint is quantised already.
        WeightsError: as `load_weights`, or a weight is not finite.
        MemoryBudgetError: the disk has not enough room.
    """
    source, out = Path(model_dir), Path(out_dir).absolute()
    config = load_config(source)
    if config.quantised:
        raise ConfigError(f"{source}: expected a checkpoint in bf16 or fp32, this one is in fp8")
    if out.exists():
        raise ConfigError(f"OUT_DIR: expected a new directory, but {out} exists")
    if not out.parent.is_dir():
        raise ConfigError(f"OUT_DIR: expected a directory to put it in, but {out.parent} is none")
    needed = weight_bytes(replace(config, quantised=True), torch.bfloat16)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise MemoryBudgetError(
            f"OUT_DIR: the checkpoint needs {needed} bytes ({format_bytes(needed)}) of disk, "
            f"but {free} bytes ({format_bytes(free)}) are free at {out.parent}"
        )
    shards = _shards(expected_shapes(config), shard_bytes)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        weight_map: dict[str, str] = {}
        held: dict[str, Tensor] = {}
        for name, tensor in stored_tensors(source, config):
            held |= _converted(name, tensor)
            if on_tensor:
                on_tensor(tensor.numel())
            file, last = shards[name]
            if last:
                save_file(held, building / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(held, file)
                held = {}
        files = set(weight_map.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
            _write_json(building / "model.safetensors.index.json", index)
        fields = read_json(source / "config.json")
        fields.pop("dtype", None)
        fields |= {"torch_dtype": "bfloat16", "quantization_config": FP8_QUANTIZATION}
        _write_json(building / "config.json", fields)
        _copy_the_rest(source, building)
        for path in building.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner reads
            _sync(path)
        building.chmod(0o755)
        _sync(building)
        building.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def quantize_with_bar(model_dir: str | Path, out_dir: str | Path, *, quiet: bool) -> None:
    """As `quantize_checkpoint`, with a bar on standard error."""
    config = load_config(model_dir)
    total = weight_bytes(config, torch.bfloat16) // 2
    with tqdm(total=total, unit="param", unit_scale=True, desc="quantize", disable=quiet) as bar:
        quantize_checkpoint(model_dir, out_dir, bar.update)


def store_kv_scales(model_dir: str | Path) -> None:
    """Keep the scales of an fp8 cache with a checkpoint: an engine then need not find them.

    They also become those of every machine: a session file goes from one to the other.
    """
    engine = Engine(
        model_dir,
        device="cpu",  # the same scales on every machine
        kv_cache_dtype="fp8",
        max_model_len=kv_scales.PASS_TOKENS,
        attention="dense",
        load_tokenizer=False,
        max_num_seqs=1,
    )
    kv_scales.store(engine.cache, Path(model_dir))


def _converted(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not is_linear(name):
        return {name: tensor.to(torch.bfloat16).contiguous()}
    try:
        matrix = quantise(tensor)
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from None
    return {name: matrix.data, name + "_scale": matrix.scale}


def _shards(shapes: dict[str, tuple[int, ...]], limit: int) -> dict[str, tuple[str, bool]]:
    """Where each tensor goes: (file, whether it is the last one of it)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = torch.Size(shape).numel() * (1 if is_linear(name) else 2)
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = files if len(groups) > 1 else ["model.safetensors"]
    return {
        name: (file, name == group[-1])
        for file, group in zip(files, groups, strict=True)
        for name in group
    }


def _copy_the_rest(source: Path, target: Path) -> None:
    """Tokenizer, templates, licence: every file that holds no weights and is not written anew."""
    for path in sorted(source.iterdir()):
        written = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in _WEIGHT_FILES and not written:
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
