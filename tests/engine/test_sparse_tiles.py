"""The tile of sparse prefill on a GPU is chosen by the lengths of a plan's runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM
from qwen1m_ext.sparse_config import SparseSettings
from qwen1m_ext.sparse_tiles import GPU_TILES, TileCost, choose_tile, tile_cost
from qwen1m_ext.sparsity import SparseAttention

END, DIM = 100_000, 128


def costs(
    runs: list[tuple[int, int]],
    columns: int = 0,
    end: int = END,
    tiles: tuple[int, ...] = GPU_TILES,
) -> list[TileCost]:
    """Of one head; an entry of the list is left over."""
    table = torch.tensor([[*runs, (-1, -1)]], dtype=torch.int32)
    count = torch.tensor([len(runs)], dtype=torch.int32)
    return [tile_cost(t, table, count, torch.tensor([columns]), end, DIM) for t in tiles]


def loaded(runs: list[tuple[int, int]], tile: int, end: int) -> int:
    """Keys that the last `tile` of `end` rows attend to, by definition."""
    rows = range(end - tile, end)
    return len({i - o for i in rows for lo, hi in runs for o in range(lo, hi) if i >= o})


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize(
    "runs",
    [[(0, 1)], [(0, 100)], [(0, 64), (128, 130), (190, 200), (700, 900)], [(50, 51), (400, 403)]],
)
def test_keys_are_those_of_the_definition(runs: list[tuple[int, int]], tile: int) -> None:
    """Runs of a plan for tiles of 64, which touch in larger tiles, are counted once."""
    (cost,) = costs(runs, end=3000, tiles=(tile,))
    assert cost.keys == loaded(runs, tile, 3000)
    assert cost.load_bytes == 4 * DIM * cost.keys / tile


def test_a_block_loads_the_keys_of_both_its_tiles_of_64() -> None:
    small, middle, large = costs([(0, 100), (5000, 5001)])
    assert (small.keys, small.load_bytes) == (middle.keys, middle.load_bytes)
    assert large.load_bytes < middle.load_bytes and large.keys > middle.keys


def test_columns_inside_of_runs_count_once() -> None:
    """All keys in one run: columns add nothing; no run: each counts."""
    assert costs([(0, END)], 500)[1].keys == END
    assert costs([], 500)[1].keys == 500
    (cost,) = costs([(0, 50_000 - 127)], 1000, tiles=(128,))
    assert cost.keys == 50_000 + 500


@pytest.mark.parametrize(
    ("runs", "columns", "tile"),
    [
        ([(0, 100)] + [(1000 * i, 1000 * i + 2) for i in range(1, 90)], 500, 128),  # dust
        ([(0, 6000), (20_000, 26_000)], 1000, 256),
        ([(0, END)], 0, 256),  # dense
        ([], 4000, 256),  # columns alone are the same for every tile
        ([], 0, 256),  # equal: the largest
    ],
)
def test_short_runs_take_small_tiles_and_long_ones_large(
    runs: list[tuple[int, int]], columns: int, tile: int
) -> None:
    assert choose_tile(costs(runs, columns)).tile_tokens == tile


def test_the_border_is_where_products_take_as_long_as_loads() -> None:
    """128 rows are bound by loads: 790 / (128 * 5.5) = 1.12 times as many keys are worth it."""
    one = [(0, 1072 - 127)]  # 1,072 keys in tiles of 128 and 1,200 in tiles of 256: 1.119
    assert choose_tile(costs(one)).tile_tokens == 256
    other = [(0, 1000 - 127)]  # 1,000 and 1,128: 1.128
    assert choose_tile(costs(other)).tile_tokens == 128


def test_heads_count_together() -> None:
    """One tile for all heads of a layer: the mean decides."""
    runs = torch.tensor([[[0, 1]], [[0, 50_000]]], dtype=torch.int32)
    count = torch.ones(2, dtype=torch.int32)
    both = [tile_cost(t, runs, count, torch.zeros(2), END, DIM) for t in GPU_TILES]
    assert both[1].keys == (128 + 50_127) / 2
    assert choose_tile(both).tile_tokens == 256


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> SparseAttention:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, model_config())
    settings = SparseSettings(tile_tokens=64)
    llm = LLM(directory, attention="sparse", max_model_len=4096, sparse_settings=settings)
    return llm.engine.sparse


def scored(attention: SparseAttention, diagonals: Tensor) -> int:
    """Scores that select these diagonals; returns how many there are."""
    attention._vertical.zero_()
    attention._slash.zero_()
    attention._slash[:, diagonals] = 1.0
    return len(diagonals)


def test_the_policy_takes_the_tile_that_is_chosen(
    attention: SparseAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the setting; where tiles are chosen, a faster larger one, planned anew."""
    heads, end = attention.config.num_q_heads, 4000
    some = torch.full((heads,), 30)
    long, short = (
        torch.arange(0, 2000),
        torch.cat([torch.arange(100), torch.arange(600, 4000, 400)]),
    )

    def select(diagonals: Tensor):
        sizes = torch.full((heads,), scored(attention, diagonals))
        return attention.select(end, some, sizes), sizes

    assert not attention.choose_tile
    assert select(long)[0].tile_tokens == 64
    key = attention.key
    monkeypatch.setattr(attention, "choose_tile", True)
    assert attention.key != key
    chosen, sizes = select(long)
    assert chosen.tile_tokens == 256
    planned = attention._plan(end, some, sizes, 256)
    assert torch.equal(chosen.run_count, planned.run_count)
    assert chosen.columns().tolist() == [2000 + 255 + 30] * heads
    # Never smaller than the setting; 64 and 128 load the same keys, so the larger one is taken.
    assert select(short)[0].tile_tokens == 128
    monkeypatch.setattr(attention, "settings", SparseSettings(tile_tokens=512))
    assert select(short)[0].tile_tokens == 512
