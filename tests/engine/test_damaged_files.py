"""1,000 damaged checkpoints: each either still works or is refused in words; nothing else happens.

A flipped bit inside a weight cannot be noticed (the format has no checksum); everything that can
be noticed must be. A crash or a hang would take the whole test run with it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.errors import Qwen1mError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "generation_config.json")  # fmt: skip
ODD_VALUES: list[Any] = [None, True, -1, 0, 1 << 70, 1.5, float("nan"), float("inf"), "", "x", [],
                         [{}], {}, {"a": 1}, [[]], "\ud800"]  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert, repeat or blank some bytes; header bytes are hit most often."""
    where = rng.randrange(min(len(data), rng.choice((16, 300, len(data)))) or 1)
    kind = rng.randrange(5)
    if kind == 0:
        return data[:where]
    if kind == 1:
        return data[:where] + bytes([data[where] ^ (1 << rng.randrange(8))]) + data[where + 1 :]
    if kind == 2:
        return data[:where] + rng.randbytes(rng.randrange(1, 9)) + data[where:]
    if kind == 3:
        return data[:where] + data[where : where + 40] * 2 + data[where:]
    return data[:where] + b"\0" * 8 + data[where + 8 :]


def damage_json(value: Any, rng: random.Random) -> Any:
    """Replace one value somewhere in the tree, or drop or rename a key."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(6)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[key + "x"] = changed.pop(key)
        else:
            changed[key] = damage_json(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], damage_json(value[index], rng), *value[index + 1 :]]
    return rng.choice(ODD_VALUES)


def damage(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(damage_json(json.loads(data), rng)))
    else:
        path.write_bytes(damage_bytes(data, rng))


def test_a_thousand_damaged_checkpoints(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(20)
    pristine = tmp_path / "pristine"
    shutil.copytree(checkpoint, pristine)
    (pristine / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [258]})
    )
    greedy = SamplingParams(temperature=0, max_tokens=1)
    outcomes: Counter[str] = Counter()
    for case in range(1000):
        directory = tmp_path / "damaged"
        shutil.copytree(pristine, directory)
        file = FILES[case % len(FILES)]
        damage(directory / file, rng)
        try:
            llm = LLM(directory, max_model_len=64)
            llm.chat([{"role": "user", "content": "Hi"}], greedy)
            outcomes[f"{file}: works"] += 1
        except Qwen1mError as error:
            assert len(str(error)) > 10, f"case {case}: {file}: {error!r}"
            outcomes[f"{file}: {type(error).__name__}"] += 1
        except BaseException as error:
            pytest.fail(f"case {case}, {file}: {type(error).__name__}: {error}")
        shutil.rmtree(directory)
    print(outcomes)
    for file in FILES:  # damage must do something, or this test tests nothing
        refused = sum(n for name, n in outcomes.items() if name.startswith(file + ": ")
                      and not name.endswith("works"))  # fmt: skip
        assert refused > 20, outcomes
