"""A step in which every sequence decodes, over memory that stays: eager, or a replayed graph.

Sequences are padded to a power of two. A row of padding has no keys, appends nothing and samples
into a row of nobody. What the host knows of a step (token ids, pages, lengths, sampling) is copied
into the inputs of that size; the work itself, from the tokens of the step before to the next ones,
reads nothing of the host, so that it can be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Batch, Rotary, decode_scratch_bytes, reserve_decode_scratch
from .config import ModelConfig
from .device import Graph, StreamDevice
from .device_sampler import DeviceSampler, Draw, Settings, sampler_bytes
from .kv_cache import KVCache, pages_for
from .model import Qwen2Model
from .ops import PAGE_SIZE

GRAPH_BYTES = 32 << 20
"""Of one captured graph: its nodes and what matrix products take. An allowance, not measured."""

_NUMBERS, _FACTORS = 8, 7
"""Of a row: int64 and float32 inputs."""


def decode_sizes(rows: int) -> list[int]:
    """Steps are padded to these: powers of two, and the largest there is."""
    sizes = [1]
    while sizes[-1] < rows:
        sizes.append(min(2 * sizes[-1], rows))
    return sizes


def decode_step_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    rows: int,
    table_rows: int,
    max_tokens: int,
    num_sms: int,
    graphs: bool,
) -> int:
    """Bytes of a `DecodeStep`, its sampler, its graphs and the scratch of its attention."""
    sizes, pages = decode_sizes(rows), pages_for(max_tokens)
    inputs = sum(sizes) * (_NUMBERS * 8 + _FACTORS * 4 + pages * 4)
    hidden = rows * config.hidden_size * dtype.itemsize
    sampler = sampler_bytes(config.vocab_size, dtype, table_rows, rows)
    scratch = decode_scratch_bytes(config, config.dual_chunk, rows, pages, num_sms)
    return inputs + hidden + sampler + scratch + len(sizes) * GRAPH_BYTES * graphs


@dataclass(frozen=True)
class DecodeRow:
    """One sequence of a step."""

    token: int  # the newest; `waiting(row)` if the host has not seen it
    logit_scale: float
    draw: Draw


class _Inputs:
    """What a step of one size reads; padding alone at first."""

    def __init__(
        self, size: int, pages: int, rotary: Rotary, cache: KVCache, where: torch.device
    ) -> None:
        self.numbers = torch.zeros(_NUMBERS, size, dtype=torch.int64, device=where)
        factors = torch.ones(_FACTORS * size, dtype=torch.float32, device=where)
        self.factors = factors[: 4 * size].view(4, size)
        self.penalties = factors[4 * size :].view(size, 3)
        self.block_table = torch.zeros(size, pages, dtype=torch.int32, device=where)
        self.token_ids, positions, slots, kv_len = self.numbers[4:].unbind()
        self.batch = Batch.of_decodes(
            rotary, cache, positions, slots, kv_len, self.factors[3], self.block_table
        )
        self.settings = Settings(self.numbers[:4], self.factors[:3], self.penalties)

    def fill(self, rows: Sequence[DecodeRow], cache: KVCache, sampler: DeviceSampler) -> None:
        """Copy the rows' inputs."""
        device, size = cache.device, len(self.token_ids)
        assert isinstance(device, StreamDevice)
        spare, draws = size - len(rows), [row.draw for row in rows]
        settings = Settings.of(draws, size, sampler.spare_row)
        positions = [draw.position for draw in draws]
        table_rows = torch.tensor([draw.row for draw in draws], dtype=torch.int64)
        longest = pages_for(max(positions, default=-1) + 1)
        pages = cache.block_table[:, :longest].index_select(0, table_rows)
        at = torch.tensor(positions, dtype=torch.int64)
        own = pages.gather(1, (at // PAGE_SIZE)[:, None])[:, 0].long()
        slots = own * PAGE_SIZE + at % PAGE_SIZE
        numbers = [
            [row.token for row in rows] + [0] * spare,
            positions + [0] * spare,
            slots.tolist() + [-1] * spare,  # appends nothing
            [position + 1 for position in positions] + [0] * spare,
        ]
        scales = torch.tensor([[row.logit_scale for row in rows] + [1.0] * spare])
        device.put_into(self.numbers, torch.cat([settings.numbers, torch.tensor(numbers)]))
        device.put_into(self.factors, torch.cat([settings.shares, scales.float()]))
        device.put_into(self.penalties, settings.penalties)
        device.put_into(self.block_table[: len(rows), :longest], pages)


class DecodeStep:
    """Steps of up to `rows` sequences."""

    def __init__(
        self,
        model: Qwen2Model,
        rotary: Rotary,
        cache: KVCache,
        rows: int,
        graphs: bool,
    ) -> None:
        """Allocate all that a step needs; capture a graph for each size, if asked to.

        Call it in the scope of the cache's device, while nothing else runs there.
        """
        device, config = cache.device, model.config
        assert isinstance(device, StreamDevice)
        table_rows, pages = cache.block_table.shape
        self.sampler = DeviceSampler(config.vocab_size, model.dtype, table_rows, rows, device)
        self._model, self._cache = model, cache
        self._hidden = torch.empty(rows, config.hidden_size, dtype=model.dtype, device=device.where)
        reserve_decode_scratch(rotary, cache, model.workspace.q[:rows, None], device.num_sms)
        self._inputs = {
            size: _Inputs(size, pages, rotary, cache, device.where) for size in decode_sizes(rows)
        }
        self._drawn: dict[int, Tensor] = {}
        self._graphs: dict[int, Graph] = {}
        with torch.inference_mode():
            for size, inputs in reversed(self._inputs.items()):  # the largest: others fit into it
                with device.step():
                    inputs.fill([], cache, self.sampler)
                with cache.step([]):
                    self._compute(size)  # what a library sets up at first use cannot be captured
                if graphs:
                    self._graphs[size] = device.capture(self._work(size))

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Compute a step; [n] the sampled tokens on the device, valid until the next step.

        The caller has begun a step of the cache.
        """
        size = next(size for size in self._inputs if size >= len(rows))
        self._inputs[size].fill(rows, self._cache, self.sampler)
        if graph := self._graphs.get(size):
            graph.replay()
        else:
            self._compute(size)
        return self._drawn[size][: len(rows)]

    def _work(self, size: int) -> Callable[[], None]:
        return lambda: self._compute(size)

    def _compute(self, size: int) -> None:
        """From the last tokens to the next ones."""
        inputs, hidden = self._inputs[size], self._hidden[:size]
        token_ids = self.sampler.known(inputs.token_ids)
        self._model.forward(token_ids, inputs.batch, out=hidden)
        self._model.logits(hidden, self.sampler.logits(size))
        self._drawn[size] = self.sampler.sample(inputs.settings)
