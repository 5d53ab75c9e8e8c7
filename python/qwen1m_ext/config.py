"""config.json and generation_config.json of a Hugging Face checkpoint, read and judged.

A field that could change the computation and is not understood is refused: a wrong answer from a
silently ignored setting is worse than no answer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError
from .ops import INFINITE_CHUNK

# Fields that do not change what is computed here. Everything else must be understood below.
_INERT = frozenset(
    {"_name_or_path", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
     "initializer_range", "max_window_layers", "sliding_window", "transformers_version",
     "use_cache", "torch_dtype", "dtype", "model_type", "architectures", "id2label", "label2id",
     "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
     "is_encoder_decoder", "problem_type", "torchscript", "use_bfloat16", "pruned_heads",
     "finetuning_task", "task_specific_params", "_attn_implementation_autoset",
     "tokenizer_class", "unsloth_version"}
)  # fmt: skip
_KNOWN = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
     "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
     "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
     "hidden_act", "attention_bias", "use_sliding_window", "layer_types",
     "dual_chunk_attention_config", "quantization_config"}
)  # fmt: skip
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


# The one quantisation that is understood, in the words of compressed-tensors: linear layers in fp8
# (e4m3) with a scale per row, activations untouched. Written by `qwen1m quantize`.
FP8_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "kv_cache_scheme": None,
}


@dataclass(frozen=True)
class DualChunkConfig:
    """Dual Chunk Attention positions; see include/qwen1m/dual_chunk.h for the rules."""

    chunk_size: int  # tokens: the largest relative position that occurs
    local_size: int  # tokens: up to here the distance to the previous chunk is true
    original_max_position_embeddings: int | None  # trained length in tokens; None: no temperature

    @property
    def chunk_len(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def is_plain(self) -> bool:
        """Whether this is plain RoPE: one chunk without an end."""
        return self.chunk_size >= INFINITE_CHUNK

    def temperature(self, num_tokens: int) -> float:
        """s(n) = max(1, 0.1 ln(n / original) + 1); logits are multiplied by its square.

        Source: Qwen2.5-1M technical report (arXiv:2501.15383), equation 1.
        """
        if not self.original_max_position_embeddings:
            return 1.0
        ratio = num_tokens / self.original_max_position_embeddings
        return max(1.0, 0.1 * math.log(ratio) + 1.0) if ratio > 1 else 1.0

    def table_rows(self, num_tokens: int, critical: bool = False) -> int:
        """Rows of the rotary table that tokens below `num_tokens` read.

        `critical`: also the positions that only the selection of sparse prefill uses; they go on
        beyond chunk_size.
        """
        if num_tokens <= self.chunk_len:
            return num_tokens
        return self.chunk_size + (self.chunk_len if critical else 1)


PLAIN_ROPE = DualChunkConfig(INFINITE_CHUNK, 0, None)


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know of a Qwen2 checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # tokens the model claims to support
    tie_word_embeddings: bool
    dtype: torch.dtype  # of the stored weights, as config.json says
    dual_chunk: DualChunkConfig  # PLAIN_ROPE when the config has none
    sparse_attention_enabled: bool = True  # whether prompts may be prefilled sparsely by default
    sparse_attention_threshold: int = 32_768  # tokens: by default only longer prompts are
    eos_token_ids: tuple[int, ...] = ()
    quantised: bool = False  # linear layers are stored in fp8, see FP8_QUANTIZATION

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token occupies in the cache, all layers, keys and values."""
        return 2 * self.num_layers * self.kv_size * dtype.itemsize


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling defaults of generation_config.json; None: not stated."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    eos_token_ids: tuple[int, ...] = field(default=())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ConfigError naming the file and the trouble."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class _Fields:
    """Typed access to a JSON object, with errors that name file, field, expectation and value."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def fail(self, name: str, expected: str) -> ConfigError:
        got = json.dumps(self.values.get(name))[:200] if name in self.values else "nothing"
        return ConfigError(f"{self.where}: {name}: expected {expected}, got {got}")

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 40
    ) -> int:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.fail(name, "an integer")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, default: float | None, low: float, high: float = 1e30) -> float:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.fail(name, "a number")
            return default
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not low <= value <= high:
            raise self.fail(name, f"a number in [{low:g}, {high:g}]")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.fail(name, "a token id or a list of token ids")
        return tuple(ids)


def _rope_theta(f: _Fields) -> float:
    scaling = f.values.get("rope_scaling")
    parameters = f.values.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is None:
            continue
        if not isinstance(value, dict):
            raise f.fail(name, "null or an object")
        kind = value.get("rope_type", value.get("type", "default"))
        rest = set(value) - {"rope_type", "type", "rope_theta"}
        if kind != "default" or rest:
            raise f.fail(name, 'null or rope_type "default" (no other RoPE scaling is implemented)')
    thetas = {
        _Fields(v, f.where).number("rope_theta", None, 1.0)
        for v in (f.values, scaling or {}, parameters or {})
        if v.get("rope_theta") is not None
    }
    if len(thetas) > 1:
        raise ConfigError(f"{f.where}: rope_theta is given more than once: {sorted(thetas)}")
    return thetas.pop() if thetas else f.number("rope_theta", None, 1.0)


def _quantised(f: _Fields) -> bool:
    value = f.values.get("quantization_config")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise f.fail("quantization_config", "null or an object")
    for name in sorted(set(value) | set(FP8_QUANTIZATION)):
        if value.get(name) != FP8_QUANTIZATION.get(name):
            expected = json.dumps(FP8_QUANTIZATION.get(name))
            what = f"{expected} (fp8 weights as `qwen1m quantize` writes them)"
            raise _Fields(value, f"{f.where}: quantization_config").fail(name, what)
    return True


_SPARSE_FIELDS = {
    "sparse_attention_enabled",
    "sparse_attention_threshold",
    "sparse_attention_last_q",
}


def _sparse_attention(f: _Fields) -> tuple[bool, int]:
    """(enabled, threshold): the fields of dual_chunk_attention_config that vLLM reads."""
    values = f.values.get("dual_chunk_attention_config") or {}
    d = _Fields(values, f"{f.where}: dual_chunk_attention_config")
    if d.integer("sparse_attention_last_q", default=64) != 64:
        raise d.fail("sparse_attention_last_q", "64 (the selecting rows of a segment) or absent")
    enabled = d.boolean("sparse_attention_enabled", True)
    return enabled, d.integer("sparse_attention_threshold", default=32_768, low=0)


def _dual_chunk(f: _Fields, max_positions: int) -> DualChunkConfig:
    value = f.values.get("dual_chunk_attention_config")
    if value is None:
        return PLAIN_ROPE
    if not isinstance(value, dict):
        raise f.fail("dual_chunk_attention_config", "null or an object")
    d = _Fields(value, f"{f.where}: dual_chunk_attention_config")
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    unknown = set(value) - known - _SPARSE_FIELDS
    if unknown:
        raise ConfigError(f"{d.where}: unknown field {sorted(unknown)[0]!r}")
    chunk_size = d.integer("chunk_size")
    local_size = d.integer("local_size", low=0)
    if local_size >= chunk_size:
        raise d.fail("local_size", f"less than chunk_size {chunk_size}")
    original = None
    if value.get("original_max_position_embeddings"):
        original = d.integer("original_max_position_embeddings")
        if original > max_positions:
            raise d.fail(
                "original_max_position_embeddings",
                f"at most max_position_embeddings {max_positions}",
            )
    return DualChunkConfig(chunk_size, local_size, original)


def load_config(model_dir: str | Path) -> ModelConfig:
    """Read `config.json` of a checkpoint directory.

    Raises:
        ConfigError: no such directory, or as `read_config`.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ConfigError(
            f"model: expected a local checkpoint directory, got {str(model_dir)!r}, which does "
            "not exist; download the model first (for example with `hf download`)"
        )
    return read_config(directory / "config.json")


def read_config(path: Path) -> ModelConfig:
    """Read a config.json.

    Raises:
        ConfigError: no such file, not JSON, an unsupported architecture, an unknown field, or
            fields that contradict each other.
    """
    f = _Fields(read_json(path), str(path))
    architectures = f.values.get("architectures")
    if architectures != ["Qwen2ForCausalLM"]:
        raise f.fail("architectures", '["Qwen2ForCausalLM"]')
    if f.values.get("model_type", "qwen2") != "qwen2":
        raise f.fail("model_type", '"qwen2"')
    unknown = set(f.values) - _INERT - _KNOWN
    if unknown:
        raise ConfigError(
            f"{path}: unknown field {sorted(unknown)[0]!r}: it could change what the model "
            "computes, so it is not ignored"
        )
    if f.values.get("hidden_act", "silu") != "silu":
        raise f.fail("hidden_act", '"silu"')
    if f.boolean("use_sliding_window", False):
        raise f.fail("use_sliding_window", "false (sliding-window attention is not implemented)")
    if f.values.get("layer_types") is not None and set(f.values["layer_types"]) - {
        "full_attention"
    }:
        raise f.fail("layer_types", 'only "full_attention"')
    if not f.boolean("attention_bias", True):
        raise f.fail("attention_bias", "true (Qwen2 has biases on q, k and v)")

    hidden = f.integer("hidden_size")
    q_heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", default=q_heads)
    if q_heads % kv_heads:
        raise f.fail("num_key_value_heads", f"a divisor of num_attention_heads {q_heads}")
    if "head_dim" not in f.values and hidden % q_heads:
        raise f.fail("hidden_size", f"a multiple of num_attention_heads {q_heads}")
    head_dim = f.integer("head_dim", default=hidden // q_heads)
    if head_dim % 16 or head_dim > 256:
        raise ConfigError(
            f"{path}: head_dim: expected a multiple of 16 up to 256, got {head_dim} "
            f"(hidden_size {hidden}, num_attention_heads {q_heads})"
        )
    dtype_name = f.values.get("torch_dtype", f.values.get("dtype")) or "bfloat16"
    dtype = _DTYPES.get(str(dtype_name).removeprefix("torch."))
    if dtype is None:
        raise f.fail("torch_dtype", f"one of {', '.join(_DTYPES)}")
    max_positions = f.integer("max_position_embeddings")
    dual_chunk = _dual_chunk(f, max_positions)
    sparse_enabled, sparse_threshold = _sparse_attention(f)
    return ModelConfig(
        vocab_size=f.integer("vocab_size", high=1 << 24),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", high=1024),
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, 1.0),
        rope_theta=_rope_theta(f),
        max_position_embeddings=max_positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        dtype=dtype,
        dual_chunk=dual_chunk,
        sparse_attention_enabled=sparse_enabled,
        sparse_attention_threshold=sparse_threshold,
        eos_token_ids=f.token_ids("eos_token_id"),
        quantised=_quantised(f),
    )


def load_generation_config(model_dir: str | Path) -> GenerationConfig:
    """Read `generation_config.json`; without the file every default is None.

    Raises:
        ConfigError: the file is not a JSON object or a value is out of range.
    """
    path = Path(model_dir) / "generation_config.json"
    if not path.exists():
        return GenerationConfig()
    f = _Fields(read_json(path), str(path))

    def number(name: str, low: float, high: float) -> float | None:
        return f.number(name, None, low, high) if f.values.get(name) is not None else None

    def integer(name: str, low: int) -> int | None:
        return f.integer(name, low=low) if f.values.get(name) is not None else None

    return GenerationConfig(
        temperature=number("temperature", 0.0, 100.0),
        top_p=number("top_p", 1e-6, 1.0),
        top_k=integer("top_k", 0),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1e-3, 100.0),
        max_new_tokens=integer("max_new_tokens", 1),
        do_sample=f.boolean("do_sample", True) if "do_sample" in f.values else None,
        eos_token_ids=f.token_ids("eos_token_id"),
    )
