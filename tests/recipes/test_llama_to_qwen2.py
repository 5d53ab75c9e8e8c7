"""A Llama checkpoint, converted, gives the logits that transformers computes for the original."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qwen1m_ext import LLM

ROOT = Path(__file__).resolve().parents[2]
transformers = pytest.importorskip("transformers")


def load_recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "recipes/llama_to_qwen2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def write_llama(directory: Path, *, tied: bool, **save: object):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory, **save)
    return model


@pytest.mark.parametrize(
    ("tied", "save"), [(False, {}), (True, {}), (False, {"max_shard_size": "200KB"})]
)
def test_logits_are_those_of_the_llama(tmp_path: Path, tied: bool, save: dict[str, object]) -> None:
    model = write_llama(tmp_path / "llama", tied=tied, **save)
    recipe.convert(tmp_path / "llama", tmp_path / "qwen")
    ids = torch.randint(0, 300, (200,)).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    got = LLM(tmp_path / "qwen", skip_tokenizer_init=True).logits(ids)
    assert (got - want).abs().max() < 1e-4


def test_dual_chunk_reaches_beyond_the_trained_length(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama", tied=True)
    recipe.convert(tmp_path / "llama", tmp_path / "qwen", (256, 64))
    llm = LLM(tmp_path / "qwen", skip_tokenizer_init=True, max_model_len=2048)
    assert llm.engine.dual_chunk.chunk_len == 192
    assert llm.logits(list(range(300)) * 3).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: expected none, got llama3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling: expected none, got yarn"),
    ],
)
def test_what_has_no_equivalent_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    write_llama(tmp_path / "llama", tied=True)
    path = tmp_path / "llama/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        recipe.convert(tmp_path / "llama", tmp_path / "qwen")
    assert not (tmp_path / "qwen").exists()


def test_bad_dual_chunk_sizes(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama", tied=True)
    with pytest.raises(ValueError, match="CHUNK_SIZE <= 256"):
        recipe.convert(tmp_path / "llama", tmp_path / "qwen", (512, 64))
