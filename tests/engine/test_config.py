"""config.json and generation_config.json: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config
from qwen1m_ext.config import load_config, load_generation_config
from qwen1m_ext.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"  # as published
QWEN_1M_7B = json.loads((CONFIGS / "qwen2.5-7b-instruct-1m.json").read_text())


def write(directory: Path, config: Any, name: str = "config.json") -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / name).write_text(text)
    return directory


def test_the_published_7b_config_is_understood(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, QWEN_1M_7B))
    assert (config.head_dim, config.num_q_heads, config.num_kv_heads) == (128, 28, 4)
    assert config.dual_chunk.chunk_len == 253_952
    assert config.dual_chunk.table_rows(1_000_000) == 262_145
    assert config.dual_chunk.table_rows(1000) == 1000
    assert config.kv_bytes_per_token(torch.bfloat16) == 57_344
    assert config.rms_norm_eps == 1e-5 and config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "squared"), [(262_144, 1.0), (524_288, 1.1434), (1_000_000, 1.2857)]
)
def test_temperature_matches_the_report(tmp_path: Path, tokens: int, squared: float) -> None:
    config = load_config(write(tmp_path, QWEN_1M_7B))
    assert config.dual_chunk.temperature(tokens) ** 2 == pytest.approx(squared, abs=1e-4)


def test_without_dual_chunk_config_it_is_plain_rope(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, model_config(dual_chunk_attention_config=None)))
    assert config.dual_chunk.is_plain
    assert config.dual_chunk.temperature(10**6) == 1.0


def test_rope_parameters_of_newer_files_are_read(tmp_path: Path) -> None:
    newer = model_config(
        rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert load_config(write(tmp_path, newer)).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "Qwen2ForCausalLM", "Llama"]),
        ({"model_type": "qwen3"}, ["model_type", "qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu", "gelu"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "false"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, ["rope_scaling", "yarn"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor", "4", "3"]),
        ({"hidden_size": 66}, ["hidden_size", "66"]),
        ({"head_dim": 24}, ["head_dim", "multiple of 16", "24"]),
        ({"vocab_size": "many"}, ["vocab_size", "integer", "many"]),
        ({"vocab_size": True}, ["vocab_size", "integer", "true"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"intermediate_size": None}, ["intermediate_size", "integer", "nothing"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"torch_dtype": "int8"}, ["torch_dtype", "bfloat16", "int8"]),
        ({"attention_bias": False}, ["attention_bias"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types", "full_attention"]),
        ({"logit_softcap": 30}, ["unknown field 'logit_softcap'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config"]),
        ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, ["rope_theta", "once"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, model_config(**changes)))
    for word in [*words, "config.json"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("dual_chunk", "words"),
    [
        ({"chunk_size": 64}, ["local_size", "integer"]),
        ({"chunk_size": 64, "local_size": 64}, ["local_size", "less than chunk_size 64"]),
        ({"chunk_size": 64, "local_size": 16, "window": 3}, ["unknown field 'window'"]),
        (
            {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 5000},
            ["original_max_position_embeddings", "4096", "5000"],
        ),
        ([64, 16], ["dual_chunk_attention_config", "object"]),
    ],
)
def test_contradictory_dual_chunk_configs(
    tmp_path: Path, dual_chunk: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, model_config(dual_chunk_attention_config=dual_chunk)))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ["not valid JSON"]), ("[1]", ["expected a JSON object", "list"]), ("\ud800", [])],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local checkpoint directory.*nowhere"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: file not found"):
        load_config(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    assert load_generation_config(tmp_path).temperature is None
    published = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                 "repetition_penalty": 1.05, "eos_token_id": [151645, 151643]}  # fmt: skip
    config = load_generation_config(write(tmp_path, published, "generation_config.json"))
    assert (config.temperature, config.top_k) == (0.7, 20)
    assert config.eos_token_ids == (151645, 151643)
    write(tmp_path, {"top_p": 3}, "generation_config.json")
    with pytest.raises(ConfigError, match="top_p: expected a number in .* got 3"):
        load_generation_config(tmp_path)
