"""sparse_attention_config.json: published files, round trip, every refusal with its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import model_config
from qwen1m_ext.config import ModelConfig, load_config
from qwen1m_ext.errors import ConfigError
from qwen1m_ext.sparse_config import (
    DEFAULT_BUDGET,
    FILE_NAME,
    HeadBudget,
    SparseConfig,
    load_sparse_config,
    read_sparse_config,
)

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "sparse_config"
GOOD = ["vertical_and_slash", 30, 800, 0.97]


def config(directory: Path, **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(model_config(**changes)))
    return load_config(directory)


def write(directory: Path, layers: Any) -> None:
    text = layers if isinstance(layers, str) else json.dumps(layers)
    (directory / FILE_NAME).write_text(text)


def heads(**changes: Any) -> dict[str, Any]:
    return {str(head): GOOD for head in range(4)} | changes


@pytest.mark.parametrize(("size", "num_heads"), [("7b", 28), ("14b", 40)])
def test_the_published_files_are_understood(tmp_path: Path, size: str, num_heads: int) -> None:
    shape = config(tmp_path, num_attention_heads=num_heads, num_key_value_heads=4, head_dim=16)
    path = FIXTURES / f"qwen2.5_{size}_1m_layers_0_1.json"
    budgets = read_sparse_config(path, shape)
    assert [len(layer) for layer in budgets.layers] == [num_heads] * 2
    for layer, written in zip(budgets.layers, json.loads(path.read_text()), strict=True):
        for head, budget in enumerate(layer):
            _, vertical, slash, score = written[str(head)]
            assert (budget.vertical_size, budget.slash_size, budget.score) == (
                vertical, slash, score
            )  # fmt: skip
            assert budget.columns == (130 if vertical == 30 else vertical)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    shape = config(tmp_path)
    assert load_sparse_config(tmp_path, shape) is None
    layer = tuple(HeadBudget(30 + i, 100 * (i + 1), 0.25 * i) for i in range(4))
    SparseConfig((layer, layer[::-1]), "a test").save(tmp_path / FILE_NAME)
    loaded = load_sparse_config(tmp_path, shape)
    assert loaded is not None and loaded.layers == (layer, layer[::-1])
    assert loaded.source == str(tmp_path / FILE_NAME)
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_the_default_is_one_budget_for_every_head(tmp_path: Path) -> None:
    default = SparseConfig.default(config(tmp_path))
    assert {(b.vertical_size, b.slash_size) for layer in default.layers for b in layer} == {
        DEFAULT_BUDGET
    }
    assert [len(layer) for layer in default.layers] == [4, 4] and "1000 + 6096" in default.source


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("{", "not valid JSON"),
        ({}, "expected a list of 2 layers, got dict"),
        ([heads()], "expected a list of 2 layers, got a list of 1"),
        ([heads(), [GOOD] * 4], 'layer 1: expected an object with the heads "0" to "3", got list'),
        ([heads(), {"0": GOOD}], r"layer 1: expected an object .* got \['0'\]"),
        ([heads(), heads(**{"4": GOOD})], r"got \['0', '1', '2', '3', '4'\]"),
        ([heads(**{"2": GOOD[:3]}), heads()], r"layer 0, head 2: expected \[.*, got \["),
        ([heads(**{"2": ["block_sparse", 1, 1, 1.0]}), heads()],
         'head 2: pattern: expected "vertical_and_slash" .* got "block_sparse"'),
        ([heads(**{"1": [GOOD[0], 0, 1, 1.0]}), heads()],
         r"vertical_size: expected an integer in \[1, 1073741824\], got 0"),
        ([heads(**{"1": [GOOD[0], 1, 2.5, 1.0]}), heads()], "slash_size: .* got 2.5"),
        ([heads(**{"1": [GOOD[0], 1, True, 1.0]}), heads()], "slash_size: .* got true"),
        ([heads(**{"1": [GOOD[0], 1, 1, 1.5]}), heads()],
         r"score: expected a number in \[0, 1\], got 1.5"),
        ([heads(**{"1": [GOOD[0], 1, 1, None]}), heads()], "score: .* got null"),
        ('[{"0": ["vertical_and_slash", 1, 1, NaN]', "not valid JSON"),
        (json.dumps([heads(**{"1": [GOOD[0], 1, 1, float("nan")]}), heads()]),
         "score: .* got NaN"),
    ],
)  # fmt: skip
def test_refusals_name_file_layer_head_and_value(tmp_path: Path, layers: Any, words: str) -> None:
    shape = config(tmp_path)
    write(tmp_path, layers)
    with pytest.raises(ConfigError, match=words) as error:
        load_sparse_config(tmp_path, shape)
    assert FILE_NAME in str(error.value)


def test_a_named_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.json: file not found"):
        read_sparse_config(tmp_path / "nowhere.json", config(tmp_path))


def test_fields_of_the_model_config(tmp_path: Path) -> None:
    dca: dict[str, Any] = {"chunk_size": 64, "local_size": 16}
    assert config(tmp_path, dual_chunk_attention_config=dca).sparse_attention_enabled
    chosen = dca | {"sparse_attention_enabled": False, "sparse_attention_threshold": 5,
                    "sparse_attention_last_q": 64}  # fmt: skip
    read = config(tmp_path, dual_chunk_attention_config=chosen)
    assert (read.sparse_attention_enabled, read.sparse_attention_threshold) == (False, 5)
    for name, value, words in (
        ("sparse_attention_last_q", 32, "sparse_attention_last_q: expected 64"),
        ("sparse_attention_enabled", 1, "sparse_attention_enabled: expected true or false"),
        ("sparse_attention_threshold", -1, "sparse_attention_threshold: expected an integer"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, dual_chunk_attention_config=dca | {name: value})
