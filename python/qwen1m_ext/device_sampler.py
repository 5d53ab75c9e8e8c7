"""Sampling where the logits are: a step's tokens stay on the device and feed the next step.

What a sample needs between steps is kept by the row of the block table that its sequence has: its
last token, and the counts that penalties look at. Tokens that the host has not seen yet are written
as `waiting(row)` wherever token ids are expected, and filled in on the device.

The op is `ops.sample`; its steps are those of `Sampler`, its random stream is another one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .device import StreamDevice
from .sampler import Sampler

_VECTOR = 8
"""Rows of logits and counts begin at multiples of so many elements: the kernel reads vectors."""


def waiting(row: int) -> int:
    """The token that a step in flight samples for this row, instead of an id."""
    return -1 - row


def _width(vocab: int) -> int:
    return -(-vocab // _VECTOR) * _VECTOR


def sampler_bytes(vocab: int, dtype: torch.dtype, table_rows: int, rows: int) -> int:
    """Bytes of a `DeviceSampler`."""
    width = _width(vocab)
    per_row = width * (dtype.itemsize + 4) + 4 * 8 + 1
    return rows * per_row + (table_rows + 1) * (8 + 4 * width)


@dataclass(frozen=True)
class Draw:
    """One row of a step to be sampled."""

    row: int  # of the block table
    position: int  # of the newest token: another one for each draw of a sample
    sampler: Sampler


@dataclass(frozen=True)
class Settings:
    """The arguments of `ops.sample` for some rows; on the host, or on the device."""

    numbers: Tensor  # [4, n] int64: row, top_k, seed, position
    shares: Tensor  # [3, n] float32: temperature, top_p, min_p
    penalties: Tensor  # [n, 3] float32

    @staticmethod
    def of(draws: Sequence[Draw], size: int, spare_row: int) -> Settings:
        """For `size` rows on the host; those beyond the draws are greedy and go to a spare row."""
        spare, samplers = size - len(draws), [draw.sampler for draw in draws]
        params = [sampler.params for sampler in samplers]
        numbers = [
            [draw.row for draw in draws] + [spare_row] * spare,
            [p.top_k for p in params] + [0] * spare,
            [sampler.stream for sampler in samplers] + [0] * spare,
            [draw.position for draw in draws] + [0] * spare,
        ]
        shares = [
            [p.temperature for p in params] + [0.0] * spare,
            [p.top_p for p in params] + [1.0] * spare,
            [p.min_p for p in params] + [0.0] * spare,
        ]
        penalties = [
            [p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params
        ]
        return Settings(
            torch.tensor(numbers),
            torch.tensor(shares, dtype=torch.float32),
            torch.tensor(penalties + [[1.0, 0.0, 0.0]] * spare, dtype=torch.float32),
        )


class DeviceSampler:
    """The state of all samples on a device."""

    def __init__(
        self, vocab: int, dtype: torch.dtype, table_rows: int, rows: int, device: StreamDevice
    ) -> None:
        """Allocate; nothing is allocated later.

        Args:
            vocab: number of tokens.
            dtype: of the model.
            table_rows: of the block table.
            rows: most that are sampled in one step.
            device: where.
        """
        self._device, self._vocab = device, vocab
        self.spare_row = table_rows  # of nobody: what a step is padded with
        where, width = device.where, _width(vocab)
        self._tokens = torch.zeros(table_rows + 1, dtype=torch.int64, device=where)
        self._history = torch.zeros(table_rows + 1, width, dtype=torch.int32, device=where)
        self._counts = torch.empty(rows, width, dtype=torch.int32, device=where)
        self._logits = torch.empty(rows, width, dtype=dtype, device=where)
        self._ids = torch.empty(3, rows, dtype=torch.int64, device=where)
        self._drawn = torch.empty(rows, dtype=torch.int64, device=where)
        self._unknown = torch.empty(rows, dtype=torch.bool, device=where)
        self._owners: dict[int, tuple[weakref.ref[Sampler], int]] = {}

    def logits(self, rows: int) -> Tensor:
        """[rows, vocab] of the model's dtype, to be filled before `sample`."""
        return self._logits[:rows, : self._vocab]

    def admit(self, draw: Draw, epoch: int, tokens: Sequence[int], prompt_len: int) -> None:
        """Bring the counts of a row up to date when it gets another sample, or this one anew.

        Args:
            draw: the row; nothing happens without penalties.
            epoch: preemptions of the sample so far.
            tokens: prompt and output; when the row is new to it, all it has drawn.
            prompt_len: how many of them are the prompt.
        """
        owner = self._owners.get(draw.row)
        if not draw.sampler.penalised or (
            owner and owner[0]() is draw.sampler and owner[1] == epoch
        ):
            return
        self._owners[draw.row] = weakref.ref(draw.sampler), epoch
        asked, said = (
            torch.bincount(torch.tensor(part, dtype=torch.int64), minlength=self._vocab)
            for part in (tokens[:prompt_len], tokens[prompt_len:])
        )
        counts = (2 * said + (asked > 0)).int()
        self._device.put_into(self._history[draw.row, : self._vocab], counts)

    def known(self, token_ids: Tensor) -> Tensor:
        """[n] token ids on the device, those that wait filled in; valid until the next call."""
        n = len(token_ids)
        rows, sampled, result = self._ids[:, :n].unbind()
        torch.bitwise_not(token_ids, out=rows)  # -1 - x
        rows.clamp_(min=0)
        torch.index_select(self._tokens, 0, rows, out=sampled)
        torch.lt(token_ids, 0, out=self._unknown[:n])
        return torch.where(self._unknown[:n], sampled, token_ids, out=result)

    def sample(self, settings: Settings) -> Tensor:
        """Draw from the leading rows of `logits`; [n] int64 on the device, -1 for a NaN.

        Valid until the next call.
        """
        rows, top_k, seed, position = settings.numbers.unbind()
        temperature, top_p, min_p = settings.shares.unbind()
        n = len(rows)
        torch.index_select(self._history, 0, rows, out=self._counts[:n])
        drawn = self._drawn[:n]
        ops.sample(
            drawn, None, self._counts[:n, : self._vocab], self.logits(n), temperature, top_k,
            top_p, min_p, settings.penalties, seed, position,
        )  # fmt: skip
        self._history.index_copy_(0, rows, self._counts[:n])
        self._tokens.index_copy_(0, rows, drawn)
        return drawn
