"""Small random Qwen2 checkpoints in Hugging Face form, with a byte tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
END_OF_TEXT = 256


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model. The defaults are the smallest that uses everything."""

    hidden: int = 64
    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # None: hidden / q_heads, and then not written to config.json
    intermediate: int = 96
    vocab: int = 259
    tied: bool = False
    theta: float = 1e4
    eps: float = 1e-6
    max_positions: int = 512
    dual_chunk: tuple[int, int, int] | None = None  # chunk_size, local_size, original maximum

    @property
    def dim(self) -> int:
        """Head dimension."""
        return self.head_dim or self.hidden // self.q_heads

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """config.json, with the fields that published Qwen2.5 checkpoints have."""
        config: dict[str, object] = {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.q_heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "sliding_window": 32768,
            "tie_word_embeddings": self.tied,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "transformers_version": "4.57.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }
        if self.head_dim:
            config["head_dim"] = self.head_dim
        if self.dual_chunk:
            names = ("chunk_size", "local_size", "original_max_position_embeddings")
            config["dual_chunk_attention_config"] = dict(zip(names, self.dual_chunk, strict=True))
        return config


def random_tensors(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Weights under their Hugging Face names, float32.

    Scales are such that logits spread by a few units and attention is neither flat nor one-hot:
    a wrong position, bias or norm then moves every logit.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    hidden, dim = shape.hidden, shape.dim
    tensors = {"model.embed_tokens.weight": normal(shape.vocab, hidden, std=1.0)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", shape.q_heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            std = 1.3 * hidden**-0.5
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(heads * dim, hidden, std=std)
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(heads * dim, std=0.5)
        width = shape.q_heads * dim
        tensors[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, width, std=width**-0.5)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = normal(
                shape.intermediate, hidden, std=hidden**-0.5
            )
        tensors[f"{prefix}mlp.down_proj.weight"] = normal(
            hidden, shape.intermediate, std=shape.intermediate**-0.5
        )
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(hidden, std=0.2)
    # A tied head reads the unit-variance embedding, so the norm before it brings logits to size.
    scale = 2 * hidden**-0.5 if shape.tied else 1.0
    tensors["model.norm.weight"] = (1 + normal(hidden, std=0.2)) * scale
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.vocab, hidden, std=2 * hidden**-0.5)
    return tensors


def byte_tokenizer() -> Tokenizer:
    """Token id = byte value, then the special tokens."""
    # GPT-2's printable stand-ins for the 256 bytes, in byte order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokenizer = Tokenizer(BPE({letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_checkpoint(
    directory: Path,
    shape: Shape,
    *,
    seed: int = 0,
    tensors: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """Write config.json, the weights and tokenizer.json; returns the directory.

    Args:
        directory: made if it is not there.
        shape: of the model.
        seed: of the random weights.
        tensors: weights to store in place of random ones.
        dtype: in which they are stored.
        shards: 1: model.safetensors; more: that many files and their index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors or random_tensors(shape, seed)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    (directory / "config.json").write_text(json.dumps(shape.config(dtype), indent=2))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[0]})
    )
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata)
        return directory
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard::shards]
        save_file({name: tensors[name] for name in held}, directory / file, metadata)
        weight_map |= dict.fromkeys(held, file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory
