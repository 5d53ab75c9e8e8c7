"""Checkpoint files: every form that is read gives the same tensors; every damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib.checkpoints import model_config, random_tensors, write_checkpoint, write_weights
from qwen1m_ext.config import load_config
from qwen1m_ext.errors import WeightsError
from qwen1m_ext.weights import ModelWeights, load_weights


def load(directory: Path, dtype: torch.dtype | None = None) -> ModelWeights:
    return load_weights(directory, load_config(directory), dtype)


def assert_same(a: ModelWeights, b: ModelWeights) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        assert all(torch.equal(v, vars(y)[name]) for name, v in vars(x).items())
    assert torch.equal(a.embed, b.embed) and torch.equal(a.lm_head, b.lm_head)


def test_q_k_v_and_gate_up_are_joined_in_order(tmp_path: Path) -> None:
    config = model_config()
    tensors = random_tensors(config)
    layer = load(write_checkpoint(tmp_path)).layers[1]
    p = "model.layers.1."
    assert torch.equal(layer.qkv[64:96], tensors[p + "self_attn.k_proj.weight"])
    assert torch.equal(layer.qkv_bias[96:], tensors[p + "self_attn.v_proj.bias"])
    assert torch.equal(layer.gate_up[:96], tensors[p + "mlp.gate_proj.weight"])


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one")
    three = write_checkpoint(tmp_path / "three", shards=3)
    assert_same(load(one), load(three))


def test_tied_head_is_the_embedding_and_untied_is_not(tmp_path: Path) -> None:
    tied = load(write_checkpoint(tmp_path / "tied"))
    assert tied.lm_head is tied.embed
    untied = model_config(tie_word_embeddings=False)
    weights = load(write_checkpoint(tmp_path / "untied", untied))
    assert torch.equal(weights.lm_head, random_tensors(untied)["lm_head.weight"])


def test_a_tensor_used_as_stored_is_mapped_not_copied(tmp_path: Path) -> None:
    """The output projection of a float32 checkpoint lies in the file's pages."""
    directory = write_checkpoint(tmp_path)
    weights = load(directory)
    address = weights.layers[0].o.data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    for line in maps.read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= address < high:
            assert "model.safetensors" in line
            return
    pytest.fail("the tensor's address is in no mapping")


def test_dtype_is_converted_on_request(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert load(directory).norm.dtype == torch.float32  # config.json says float32
    assert load(directory, torch.bfloat16).norm.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", ["1 missing tensor", "model.norm.weight"]),
        ("extra", ["1 unknown tensor", "model.layers.2.mlp.bias"]),
        ("shape", ["model.norm.weight", "expected shape [64]", "got [63]"]),
        ("dtype", ["model.norm.weight", "float32, bfloat16 or float16", "int64"]),
        ("untied", ["lm_head.weight differs", "tie_word_embeddings"]),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: str, words: list[str]) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = random_tensors(model_config())
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "extra":
        tensors["model.layers.2.mlp.bias"] = torch.zeros(3)
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(63)
    elif change == "dtype":
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int64)
    else:
        tensors["lm_head.weight"] = torch.zeros(260, 64)
    write_weights(directory, tensors)
    with pytest.raises(WeightsError) as caught:
        load(directory)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    directory = write_checkpoint(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"model\.safetensors: .*truncated or corrupt"):
        load(directory)


def test_index_troubles(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=2)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="00002.*file not found, but the index names it"):
        load(directory)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"plain file names, got '\.\./elsewhere"):
        load(directory)
    index_path.write_text("{}")
    with pytest.raises(WeightsError, match="weight_map"):
        load(directory)


def test_no_weights_at_all(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="found neither"):
        load(directory)
