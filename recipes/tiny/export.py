"""Writes a Hugging Face Qwen2 directory: configuration, bfloat16 weights and tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from data import END_OF_TEXT, IM_END, IM_START
from safetensors.torch import save_file

from model import TinyConfig

# The smaller the chunk, the fewer distances does a far key appear at (513 to 1024 here). With a
# chunk of the whole trained length the same weights found 16 of 20 at 32,768 tokens, not 20
# (README.md).
TRAINED_LENGTH, CHUNK_SIZE, LOCAL_SIZE = 2048, 1024, 512
MAX_LENGTH = 1010000  # as Qwen2.5-1M: the length that the engine serves, not the trained one
SPECIAL = {END_OF_TEXT: "<|endoftext|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """Returns the character that byte-level BPE (GPT-2) writes for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    codes = {byte: byte for byte in plain} | {byte: 256 + i for i, byte in enumerate(other)}
    return [chr(codes[byte]) for byte in range(256)]


def _tokenizer() -> dict[str, Any]:
    """Returns tokenizer.json: byte-level BPE without merges, so a token is the value of a byte."""
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(text) | {"id": token} for token, text in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _added_token(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, **flags, "special": True}


def export(params: dict[str, torch.Tensor], config: TinyConfig, theta: float, folder: Path) -> None:
    """Writes a model directory.

    Args:
        params: Parameters by their Hugging Face names.
        config: Architecture.
        theta: RoPE base of the last stage.
        folder: Directory to write; it is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in params.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it was made readable for its owner only
    files = {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": IM_END,
            "pad_token_id": END_OF_TEXT,
            "dual_chunk_attention_config": {
                "chunk_size": CHUNK_SIZE,
                "local_size": LOCAL_SIZE,
                "original_max_position_embeddings": TRAINED_LENGTH,
            },
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": MAX_LENGTH,
            "max_window_layers": config.num_hidden_layers,
            "model_type": "qwen2",
            "rope_scaling": None,
            "rope_theta": theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            **asdict(config),
        },
        "generation_config.json": {
            "bos_token_id": END_OF_TEXT,
            "do_sample": False,
            "eos_token_id": [IM_END, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token): _added_token(text) for token, text in SPECIAL.items()
            },
            "additional_special_tokens": [SPECIAL[IM_START], SPECIAL[IM_END]],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[IM_END],
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": SPECIAL[END_OF_TEXT],
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
