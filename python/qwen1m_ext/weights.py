"""Checkpoint tensors: safetensors (one file or shards) -> the tensors the model multiplies with.

Files are memory-mapped: a tensor that is used as stored is never copied. q, k and v (and gate and
up) are joined into one matrix each, because one product of twice the width is faster than two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig, read_json
from .device import CPU, Device
from .errors import ConfigError, WeightsError
from .fp8 import FP8, Fp8Matrix, fault
from .linear import Matrix

_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], in the run dtype or fp8."""

    input_norm: Tensor  # [hidden]
    qkv: Matrix  # [q + 2 kv, hidden]: q rows, k rows, v rows
    qkv_bias: Tensor  # [q + 2 kv]
    o: Matrix  # [hidden, q]
    post_norm: Tensor  # [hidden]
    gate_up: Matrix  # [2 intermediate, hidden]: gate rows, then up rows
    down: Matrix  # [hidden, intermediate]


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a Qwen2 model."""

    embed: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]; the embedding itself when tied


def fingerprint(weights: ModelWeights) -> str:
    """Tells checkpoints apart: a hash of 64 values of every matrix and bias, and the shapes."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = [weights.embed, weights.norm, weights.lm_head]
    for part in (part for layer in weights.layers for part in vars(layer).values()):
        tensors += [part.data, part.scale] if isinstance(part, Fp8Matrix) else [part]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of this config holds.

    When it is quantised, a `weight_scale` [out, 1] stands beside every linear layer's weight.
    """
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (q, h),
            p + "self_attn.q_proj.bias": (q,),
            p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.k_proj.bias": (kv,),
            p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.v_proj.bias": (kv,),
            p + "self_attn.o_proj.weight": (h, q),
            p + "post_attention_layernorm.weight": (h,),
            p + "mlp.gate_proj.weight": (i, h),
            p + "mlp.up_proj.weight": (i, h),
            p + "mlp.down_proj.weight": (h, i),
        }
    if config.quantised:
        shapes |= {n + "_scale": (s[0], 1) for n, s in shapes.items() if is_linear(n)}
    return shapes


def is_linear(name: str) -> bool:
    """Whether a tensor is the matrix of a linear layer: what quantisation changes."""
    return name.endswith("_proj.weight")


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all tensors; linear layers of a quantised checkpoint in fp8, the rest in `dtype`."""
    total = 0
    for name, shape in expected_shapes(config).items():
        linear = config.quantised and is_linear(name)
        scale = name.endswith("_scale")
        total += math.prod(shape) * (1 if linear else 4 if scale else dtype.itemsize)
    return total


class _Checkpoint:
    """The open files of a checkpoint and which of them holds which tensor."""

    def __init__(
        self, files: dict[str, Any], dtype: torch.dtype, quantised: bool, device: Device
    ) -> None:
        self._files, self._dtype, self._quantised = files, dtype, quantised
        self._where = device.where

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def stored(self, name: str, dtypes: tuple[torch.dtype, ...] = _STORED_DTYPES) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"{name}: cannot be read: {error}") from None
        if tensor.dtype not in dtypes:
            *rest, last = (str(d).removeprefix("torch.") for d in dtypes)
            expected = f"{', '.join(rest)} or {last}" if rest else last
            raise WeightsError(f"{name}: expected {expected}, got {tensor.dtype}")
        return tensor

    def get(self, name: str) -> Tensor:
        return self.stored(name).to(self._where, self._dtype)

    def join(self, *names: str) -> Tensor:
        return torch.cat([self.get(name) for name in names])

    def matrix(self, *names: str) -> Matrix:
        """The weights of a linear layer, or of several joined."""
        if not self._quantised:
            return self.join(*names) if len(names) > 1 else self.get(names[0])
        parts = []
        for name in names:
            part = Fp8Matrix(
                self.stored(name, (FP8,)), self.stored(name + "_scale", (torch.float32,))
            )
            if wrong := fault(part):
                raise WeightsError(f"{name}: {wrong}")
            parts.append(Fp8Matrix(part.data.to(self._where), part.scale.to(self._where)))
        if len(parts) == 1:
            return parts[0]
        return Fp8Matrix(torch.cat([p.data for p in parts]), torch.cat([p.scale for p in parts]))


@contextmanager
def _open_checkpoint(
    directory: Path, dtype: torch.dtype, quantised: bool, device: Device = CPU
) -> Iterator[_Checkpoint]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        try:
            weight_map = read_json(index).get("weight_map")
        except ConfigError as error:
            raise WeightsError(str(error)) from None
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise WeightsError(f"{index}: weight_map: expected an object of tensor: file")
        for file in set(weight_map.values()):
            if Path(file).name != file:  # an index must not reach outside its checkpoint
                raise WeightsError(f"{index}: expected plain file names, got {file!r}")
    elif single.exists():
        weight_map = None
    else:
        raise WeightsError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, "
            "found neither (other weight formats are not read)"
        )
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for file in sorted(set(weight_map.values())) if weight_map else [single.name]:
            path = directory / file
            if not path.is_file():
                raise WeightsError(f"{path}: file not found, but the index names it")
            try:
                opened[file] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError, ValueError) as error:
                raise WeightsError(
                    f"{path}: not a readable safetensors file (truncated or corrupt): {error}"
                ) from None
        files: dict[str, Any] = {}
        for file, handle in opened.items():
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if weight_map is not None and weight_map.get(name) != file:
                    continue
                files[name] = handle
        for name, file in (weight_map or {}).items():
            if name not in files:
                raise WeightsError(f"{directory / file}: tensor {name!r} is in the index, not here")
        yield _Checkpoint(files, dtype, quantised, device)


def _check_names_and_shapes(checkpoint: _Checkpoint, config: ModelConfig, directory: Path) -> None:
    expected = expected_shapes(config)
    # Old exports store the rotary frequencies, which follow from the config.
    found = {n for n in checkpoint.names() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in found:
        embed = checkpoint.get("model.embed_tokens.weight")
        if not torch.equal(checkpoint.get("lm_head.weight"), embed):
            raise WeightsError(
                f"{directory}: lm_head.weight differs from model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings: true"
            )
        found.discard("lm_head.weight")
    for what, names in (("missing", expected.keys() - found), ("unknown", found - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise WeightsError(
                f"{directory}: {len(names)} {what} tensor(s) for this config.json: {shown}"
                + (", ..." if len(names) > 3 else "")
            )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise WeightsError(
                f"{directory}: {name}: expected shape {list(shape)} from config.json, "
                f"got {list(checkpoint.shape(name))}"
            )


def stored_tensors(model_dir: str | Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an unquantised checkpoint as it is stored, one at a time.

    Raises:
        WeightsError: as `load_weights`.
    """
    directory = Path(model_dir)
    with _open_checkpoint(directory, config.dtype, quantised=False) as checkpoint:
        _check_names_and_shapes(checkpoint, config, directory)
        for name in expected_shapes(config):
            yield name, checkpoint.stored(name)


def load_weights(
    model_dir: str | Path,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: Device = CPU,
) -> ModelWeights:
    """Load every tensor of a checkpoint in `dtype` (default: the stored one), to a device.

    Raises:
        WeightsError: files missing, truncated or corrupt; tensors missing, superfluous, misshapen
            or of an unsupported dtype.
    """
    directory = Path(model_dir)
    dtype = dtype or config.dtype
    with _open_checkpoint(directory, dtype, config.quantised, device) as checkpoint:
        _check_names_and_shapes(checkpoint, config, directory)
        get, join, matrix = checkpoint.get, checkpoint.join, checkpoint.matrix
        layers = []
        for layer in range(config.num_layers):
            p = f"model.layers.{layer}."
            attn, mlp = p + "self_attn.", p + "mlp."
            layers.append(
                LayerWeights(
                    input_norm=get(p + "input_layernorm.weight"),
                    qkv=matrix(*(f"{attn}{x}_proj.weight" for x in "qkv")),
                    qkv_bias=join(*(f"{attn}{x}_proj.bias" for x in "qkv")),
                    o=matrix(attn + "o_proj.weight"),
                    post_norm=get(p + "post_attention_layernorm.weight"),
                    gate_up=matrix(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                    down=matrix(mlp + "down_proj.weight"),
                )
            )
        embed = get("model.embed_tokens.weight")
        lm_head = embed if config.tie_word_embeddings else get("lm_head.weight")
        return ModelWeights(embed, tuple(layers), get("model.norm.weight"), lm_head)
