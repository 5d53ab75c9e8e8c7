"""Random Qwen2 checkpoints in Hugging Face form, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def model_config(**changes: Any) -> dict[str, Any]:
    """A config.json: 2 layers, 4/2 heads x 16, Dual Chunk Attention with chunks of 48 tokens."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": 258,
        "use_sliding_window": False,
        "dual_chunk_attention_config": {
            "chunk_size": 64,
            "local_size": 16,
            "original_max_position_embeddings": 64,
        },
    }
    config.update(changes)
    return {name: value for name, value in config.items() if value is not None}


def random_tensors(config: dict[str, Any], seed: int = 0, gain: float = 1.0) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, written out here independently of the loader."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q = config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, std=gain / columns**0.5)

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": 1 + normal(hidden, std=0.1),
    }
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        tensors[p + "input_layernorm.weight"] = 1 + normal(hidden, std=0.1)
        tensors[p + "post_attention_layernorm.weight"] = 1 + normal(hidden, std=0.1)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            tensors[f"{p}self_attn.{name}_proj.bias"] = normal(rows, std=0.3)
        tensors[p + "self_attn.o_proj.weight"] = matrix(hidden, q)
        tensors[p + "mlp.gate_proj.weight"] = matrix(inter, hidden)
        tensors[p + "mlp.up_proj.weight"] = matrix(inter, hidden)
        tensors[p + "mlp.down_proj.weight"] = matrix(hidden, inter)
    return tensors


def write_weights(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or that many shards with an index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_level_tokenizer() -> dict[str, Any]:
    """tokenizer.json of a tokenizer whose ids are byte values, plus the special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocab, extra = {}, 256
    for byte in range(256):  # GPT-2's map of bytes to visible characters
        if byte in printable:
            vocab[chr(byte)] = byte
        else:
            vocab[chr(extra)] = byte
            extra += 1
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}  # fmt: skip
    added = [
        {"id": 256 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
             "vocab": vocab, "merges": []}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": model}  # fmt: skip


def write_checkpoint(
    directory: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    gain: float = 1.0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A whole checkpoint directory; returns it."""
    config = config or model_config()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {n: t.to(dtype) for n, t in random_tensors(config, seed, gain).items()}
    write_weights(directory, tensors, shards)
    (directory / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer()))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
