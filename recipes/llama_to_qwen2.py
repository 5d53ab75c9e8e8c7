"""Rewrite a Llama-shaped checkpoint as a Qwen2 one that this engine loads.

    python recipes/llama_to_qwen2.py SOURCE TARGET [--dual-chunk CHUNK_SIZE LOCAL_SIZE]

The two architectures compute the same but for the biases of q, k and v, which Llama does not have:
they are added as zeros. Weights are copied shard by shard, bit for bit. With `--dual-chunk`, Dual
Chunk Attention is switched on with the checkpoint's own trained length, so that it reads texts
longer than that (as ChunkLlama, arXiv:2402.17463, does without training).

Refused, with the reason: attention or MLP biases, RoPE scaling other than none, activations other
than SiLU, another architecture. Llama 3.1 and later scale RoPE and cannot be converted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEPT = (
    "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    "vocab_size",
)  # fmt: skip
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                "chat_template.jinja", "special_tokens_map.json")  # fmt: skip


def converted_config(source: dict[str, Any], dual_chunk: tuple[int, int] | None) -> dict[str, Any]:
    """The Qwen2 config of a Llama config. Raises ValueError for what has no Qwen2 equivalent."""
    if source.get("architectures") != ["LlamaForCausalLM"]:
        raise ValueError(
            f'architectures: expected ["LlamaForCausalLM"], got {source.get("architectures")}'
        )
    for name in ("attention_bias", "mlp_bias"):
        if source.get(name):
            raise ValueError(f"{name}: expected false, got {source[name]} (Qwen2 has no such bias)")
    if source.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: expected silu, got {source['hidden_act']}")
    parameters = source.get("rope_parameters") or {}
    scaling = source.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_scaling: expected none, got {kind}")
    target = {name: source[name] for name in KEPT if source.get(name) is not None}
    target.setdefault("rope_theta", parameters.get("rope_theta", 10000.0))  # Llama's default
    target.setdefault("num_key_value_heads", source["num_attention_heads"])
    target.setdefault("tie_word_embeddings", False)
    target |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": source.get("torch_dtype", source.get("dtype", "bfloat16")),
        "use_sliding_window": False,
    }
    if dual_chunk:
        chunk_size, local_size = dual_chunk
        trained = source["max_position_embeddings"]
        if not 0 <= local_size < chunk_size <= trained:
            raise ValueError(
                f"--dual-chunk: expected 0 <= LOCAL_SIZE < CHUNK_SIZE <= {trained} (the trained "
                f"length), got {chunk_size} {local_size}"
            )
        target["dual_chunk_attention_config"] = {
            "chunk_size": chunk_size,
            "local_size": local_size,
            "original_max_position_embeddings": trained,
        }
        target["max_position_embeddings"] = 1_010_000
    return target


def convert_shard(source: Path, target: Path, config: dict[str, Any]) -> dict[str, str]:
    """Copy a safetensors file with zero biases beside each q, k, v weight; returns its index."""
    tensors = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            tensor = tensors[name] = file.get_tensor(name)
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                bias = name.removesuffix("weight") + "bias"
                tensors[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    save_file(tensors, target, metadata={"format": "pt"})
    return dict.fromkeys(tensors, target.name)


def convert(source: Path, target: Path, dual_chunk: tuple[int, int] | None = None) -> None:
    """Convert a checkpoint directory. The target must not exist yet."""
    config = converted_config(json.loads((source / "config.json").read_text()), dual_chunk)
    shards = sorted(source.glob("model*.safetensors"))
    if not shards:
        raise ValueError(f"{source}: expected model*.safetensors, found none")
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in shards:
        weight_map |= convert_shard(shard, target / shard.name, config)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="directory of a LlamaForCausalLM checkpoint")
    parser.add_argument("target", type=Path, help="directory to create")
    parser.add_argument("--dual-chunk", type=int, nargs=2, metavar=("CHUNK_SIZE", "LOCAL_SIZE"))
    args = parser.parse_args()
    try:
        convert(args.source, args.target, tuple(args.dual_chunk) if args.dual_chunk else None)
    except (ValueError, OSError) as error:
        print(f"llama_to_qwen2: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
