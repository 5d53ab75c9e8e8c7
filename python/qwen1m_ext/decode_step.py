"""A step in which every sequence decodes, over memory that stays: eager, or a replayed graph.

Sequences are padded to a power of two. A row of padding has no keys, appends nothing and samples
into a row of nobody. What the host knows of a step (token ids, pages, lengths, sampling) is copied
into the inputs of that size; the work itself, from the tokens of the step before to the next ones,
reads nothing of the host, so that it can be captured once and replayed.

With speculation a step of few sequences may have several tokens of each: the newest and a guess of
what follows. There are a few numbers of them; a shorter guess is padded in front, with tokens that
are in the cache already, so that no row is written or read that is not the sequence's own.
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
from .kv_cache import KVCache, SequenceCache, pages_for
from .model import Qwen2Model
from .ops import PAGE_SIZE
from .speculative import MAX_DRAFT

GRAPH_BYTES = 32 << 20
"""Of one captured graph: its nodes and what matrix products take. An allowance, not measured."""

CHECK_SEQUENCES = 4
"""Most sequences of a prepared check. With more of them a step reads the weights for many rows
already, and goes on without guesses and without waiting."""

CHECK_TOKENS = (4, 8, MAX_DRAFT + 1)
"""Tokens of each sequence of a captured check."""

_NUMBERS, _FACTORS = 9, 7
"""Of a row: int64 and float32 inputs."""


def most_rows(rows: int, speculative: bool, chunk_tokens: int) -> int:
    """Rows of a step that may be sampled on a device: one of each sequence, and guesses.

    chunk_tokens: what the model's workspace holds.
    """
    guessed = min(rows, CHECK_SEQUENCES) * MAX_DRAFT if speculative else 0
    return min(rows + guessed, chunk_tokens)


def decode_shapes(rows: int, speculative: bool, chunk_tokens: int) -> list[tuple[int, int]]:
    """(sequences, tokens of each) of the steps that are prepared."""
    shapes = [(size, 1) for size in decode_sizes(rows)]
    if speculative:
        few = decode_sizes(min(rows, CHECK_SEQUENCES))
        shapes += [(n, t) for n in few for t in CHECK_TOKENS if n * t <= chunk_tokens]
    return shapes


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
    speculative: bool,
    chunk_tokens: int,
) -> int:
    """Bytes of a `DecodeStep`, its sampler, its graphs and the scratch of its attention."""
    shapes, pages = decode_shapes(rows, speculative, chunk_tokens), pages_for(max_tokens)
    inputs = sum(
        n * t * (_NUMBERS * 8 + _FACTORS * 4 + (t - 1) * 12) + n * pages * 4 for n, t in shapes
    )
    most = most_rows(rows, speculative, chunk_tokens)
    hidden = most * config.hidden_size * dtype.itemsize
    sampler = sampler_bytes(config.vocab_size, dtype, table_rows, most)
    scratch = decode_scratch_bytes(config, config.dual_chunk, most, pages, num_sms)
    return inputs + hidden + sampler + scratch + len(shapes) * GRAPH_BYTES * graphs


@dataclass(frozen=True)
class DecodeRow:
    """One sequence of a step."""

    cache: SequenceCache
    token: int  # the newest; `waiting(row)` if the host has not seen it
    draws: Sequence[Draw]  # after it, and after each guessed token
    logit_scales: Sequence[float]  # of each
    draft: Sequence[int] = ()  # the guess

    @property
    def end(self) -> int:
        """Tokens in the cache, when the step is done."""
        return self.draws[-1].position + 1


class _Inputs:
    """What a step of one shape reads; padding alone at first."""

    def __init__(
        self,
        shape: tuple[int, int],
        pages: int,
        rotary: Rotary,
        cache: KVCache,
        where: torch.device,
    ) -> None:
        self.sequences, self.tokens = shape
        size, guesses = self.sequences * self.tokens, self.tokens - 1
        self.numbers = torch.zeros(_NUMBERS, size, dtype=torch.int64, device=where)
        factors = torch.ones(_FACTORS * size, dtype=torch.float32, device=where)
        self.factors = factors[: 4 * size].view(4, size)
        self.penalties = factors[4 * size :].view(size, 3)
        self.block_table = torch.zeros(self.sequences, pages, dtype=torch.int32, device=where)
        self.before = torch.zeros(size, guesses, dtype=torch.int64, device=where)
        self.weights = torch.zeros(size, guesses, dtype=torch.int32, device=where)
        self.token_ids, positions, slots, kv_len = self.numbers[5:].unbind()
        self.batch = Batch.of_decodes(
            rotary,
            cache,
            positions,
            slots,
            kv_len[: self.sequences],
            self.factors[3],
            self.block_table,
        )
        self.settings = Settings(
            self.numbers[:5], self.factors[:3], self.penalties, self.before, self.weights
        )

    def takes(self, rows: Sequence[DecodeRow]) -> bool:
        """Whether a step of these rows fits into this shape."""
        return len(rows) <= self.sequences and all(
            len(row.draws) <= self.tokens <= row.end for row in rows
        )

    def fill(self, rows: Sequence[DecodeRow], cache: KVCache, sampler: DeviceSampler) -> None:
        """Copy the rows' inputs."""
        device, tokens = cache.device, self.tokens
        assert isinstance(device, StreamDevice)
        spare = self.sequences - len(rows)
        ids: list[int] = []
        scales: list[float] = []
        draws: list[Draw | None] = []
        fresh: list[bool] = []  # whether keys and values are appended
        for row in rows:
            pad = tokens - len(row.draws)
            ids += [*[0] * pad, row.token, *row.draft]
            draws += [*[None] * pad, *row.draws]
            scales += [*[row.logit_scales[0]] * pad, *row.logit_scales]
            fresh += [*[False] * pad, *[True] * len(row.draws)]
        settings = Settings.of([*draws, *[None] * spare * tokens], sampler.spare_row, tokens - 1)
        ends = torch.tensor([row.end for row in rows], dtype=torch.int64)
        table_rows = torch.tensor([row.cache.row for row in rows], dtype=torch.int64)
        longest = pages_for(max((row.end for row in rows), default=0))
        pages = cache.block_table[:, :longest].index_select(0, table_rows)
        at = ends[:, None] + torch.arange(-tokens, 0)  # [rows, tokens]
        slots = pages.gather(1, at // PAGE_SIZE).long() * PAGE_SIZE + at % PAGE_SIZE
        slots = torch.where(torch.tensor(fresh, dtype=torch.bool), slots.view(-1), -1)
        numbers = torch.zeros(_NUMBERS - 5, tokens * self.sequences, dtype=torch.int64)
        numbers[2] = -1  # padding appends nothing
        for line, values in zip(
            numbers, (torch.tensor(ids, dtype=torch.int64), at.view(-1), slots, ends), strict=True
        ):
            line[: len(values)] = values
        scale = torch.tensor([scales + [1.0] * spare * tokens])
        device.put_into(self.numbers, torch.cat([settings.numbers, numbers]))
        device.put_into(self.factors, torch.cat([settings.shares, scale.float()]))
        device.put_into(self.penalties, settings.penalties)
        device.put_into(self.block_table[: len(rows), :longest], pages)
        if tokens > 1:
            device.put_into(self.before, settings.before)
            device.put_into(self.weights, settings.weights)


class DecodeStep:
    """Steps of up to `rows` sequences."""

    def __init__(
        self,
        model: Qwen2Model,
        rotary: Rotary,
        cache: KVCache,
        rows: int,
        graphs: bool,
        speculative: bool,
    ) -> None:
        """Allocate all that a step needs; capture a graph for each shape, if asked to.

        Call it in the scope of the cache's device, while nothing else runs there.
        """
        device, config = cache.device, model.config
        assert isinstance(device, StreamDevice)
        table_rows, pages = cache.block_table.shape
        chunk_tokens = model.workspace.chunk_tokens
        most = most_rows(rows, speculative, chunk_tokens)
        self.sampler = DeviceSampler(config.vocab_size, model.dtype, table_rows, most, device)
        self._model, self._cache = model, cache
        self._hidden = torch.empty(most, config.hidden_size, dtype=model.dtype, device=device.where)
        reserve_decode_scratch(rotary, cache, model.workspace.q[:most, None], device.num_sms)
        shapes = decode_shapes(rows, speculative, chunk_tokens)
        shapes.sort(key=lambda shape: shape[0] * shape[1])
        self._inputs = [_Inputs(shape, pages, rotary, cache, device.where) for shape in shapes]
        self._drawn: dict[_Inputs, Tensor] = {}
        self._graphs: dict[_Inputs, Graph] = {}
        with torch.inference_mode():
            for inputs in reversed(self._inputs):  # the largest: others fit into its memory
                with device.step():
                    inputs.fill([], cache, self.sampler)
                with cache.step([]):
                    self._compute(inputs)  # what a library sets up at first use cannot be captured
                if graphs:
                    self._graphs[inputs] = device.capture(self._work(inputs))

    def run(self, rows: Sequence[DecodeRow]) -> tuple[Tensor, list[range]] | None:
        """Compute a step, if one of its shape is prepared; otherwise nothing is done.

        Returns:
            [n] the sampled tokens on the device, valid until the next step, and which of them are
            each sequence's.
        """
        inputs = next((inputs for inputs in self._inputs if inputs.takes(rows)), None)
        if inputs is None:
            return None
        inputs.fill(rows, self._cache, self.sampler)
        with self._cache.step([(row.cache, row.draws[0].position, row.end) for row in rows]):
            if graph := self._graphs.get(inputs):
                graph.replay()
            else:
                self._compute(inputs)
        t = inputs.tokens
        own = [range((i + 1) * t - len(row.draws), (i + 1) * t) for i, row in enumerate(rows)]
        return self._drawn[inputs][: len(rows) * t], own

    def _work(self, inputs: _Inputs) -> Callable[[], None]:
        return lambda: self._compute(inputs)

    def _compute(self, inputs: _Inputs) -> None:
        """From the last tokens to the next ones."""
        size = len(inputs.token_ids)
        hidden = self._hidden[:size]
        token_ids = self.sampler.known(inputs.token_ids)
        self._model.forward(token_ids, inputs.batch, out=hidden)
        self._model.logits(hidden, self.sampler.logits(size))
        self._drawn[inputs] = self.sampler.sample(inputs.settings)
