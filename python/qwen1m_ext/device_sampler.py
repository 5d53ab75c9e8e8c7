"""Sampling where the logits are: a step's tokens stay on the device and feed the next step.

What a sample needs between steps is kept by the row of the block table that its sequence has: its
last token, and the counts that penalties look at. Tokens that the host has not seen yet are written
as `waiting(row)` wherever token ids are expected, and filled in on the device.

The op is `ops.sample`; its steps are those of `Sampler`, its random stream is another one.

With speculation some rows follow guessed tokens (`speculative.py`). Each is drawn as if the guesses
before it had been said; nothing of it is kept here. What was said, the host knows before the next
draw of that sample, and `admit` counts it.
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
    before: Sequence[int] = ()  # guessed tokens after the newest one
    checks: bool = False  # it belongs to the check of a guess: the host says what came of it


@dataclass(frozen=True)
class _Owner:
    """Whose tokens a row's counts hold."""

    sampler: weakref.ref[Sampler]
    epoch: int
    counted: int  # tokens of the sample, those of steps in flight included


@dataclass(frozen=True)
class Settings:
    """The arguments of `ops.sample` for some rows; on the host, or on the device."""

    numbers: Tensor  # [5, n] int64: row, row that is written, top_k, seed, position
    shares: Tensor  # [3, n] float32: temperature, top_p, min_p
    penalties: Tensor  # [n, 3] float32
    before: Tensor  # [n, most guesses] int64: tokens that count as said
    weights: Tensor  # the same shape, int32: 2 for each of them, 0 beyond

    @staticmethod
    def of(draws: Sequence[Draw | None], spare_row: int, guesses: int) -> Settings:
        """On the host. None: greedy, into a spare row. guesses: most that come before a draw."""
        rows: list[list[int]] = []
        shares, penalties = [], []
        before = torch.zeros(len(draws), guesses, dtype=torch.int64)
        weights = torch.zeros(len(draws), guesses, dtype=torch.int32)
        for i, draw in enumerate(draws):
            if draw is None:
                rows.append([spare_row, spare_row, 0, 0, 0])
                shares.append([0.0, 1.0, 0.0])
                penalties.append([1.0, 0.0, 0.0])
                continue
            p, target = draw.sampler.params, spare_row if draw.checks else draw.row
            rows.append([draw.row, target, p.top_k, draw.sampler.stream, draw.position])
            shares.append([p.temperature, p.top_p, p.min_p])
            penalties.append([p.repetition_penalty, p.presence_penalty, p.frequency_penalty])
            if draw.before:
                before[i, : len(draw.before)] = torch.tensor(draw.before)
                weights[i, : len(draw.before)] = 2
        return Settings(
            torch.tensor(rows).T.contiguous(),
            torch.tensor(shares, dtype=torch.float32).T.contiguous(),
            torch.tensor(penalties, dtype=torch.float32),
            before,
            weights,
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
        self._owners: dict[int, _Owner] = {}

    def logits(self, rows: int) -> Tensor:
        """[rows, vocab] of the model's dtype, to be filled before `sample`."""
        return self._logits[:rows, : self._vocab]

    def admit(self, draw: Draw, epoch: int, tokens: Sequence[int], prompt_len: int) -> None:
        """Bring the counts of a row up to date before a draw, or before the first of a check.

        They are counted anew when the row gets another sample, or this one after a preemption;
        otherwise those are added that checks have accepted.

        Args:
            draw: the row; nothing happens without penalties.
            epoch: preemptions of the sample so far.
            tokens: prompt and output; when something has to be counted, all it has drawn.
            prompt_len: how many of them are the prompt.
        """
        if not draw.sampler.penalised:
            return
        due = draw.position + 1
        owner, history = self._owners.get(draw.row), self._history[draw.row, : self._vocab]
        if owner and owner.sampler() is draw.sampler and owner.epoch == epoch:
            if missing := tokens[owner.counted : due]:
                ids = self._device.put(torch.tensor(missing, dtype=torch.int64))
                history.index_add_(0, ids, torch.full_like(ids, 2, dtype=torch.int32))
        else:
            asked, said = (
                torch.bincount(torch.tensor(part, dtype=torch.int64), minlength=self._vocab)
                for part in (tokens[:prompt_len], tokens[prompt_len:])
            )
            self._device.put_into(history, (2 * said + (asked > 0)).int())
        counted = due if draw.checks else due + 1
        self._owners[draw.row] = _Owner(weakref.ref(draw.sampler), epoch, counted)

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
        rows, targets, top_k, seed, position = settings.numbers.unbind()
        temperature, top_p, min_p = settings.shares.unbind()
        n = len(rows)
        torch.index_select(self._history, 0, rows, out=self._counts[:n])
        if settings.before.shape[1]:
            self._counts[:n].scatter_add_(1, settings.before, settings.weights)
        drawn = self._drawn[:n]
        ops.sample(
            drawn, None, self._counts[:n, : self._vocab], self.logits(n), temperature, top_k,
            top_p, min_p, settings.penalties, seed, position,
        )  # fmt: skip
        self._history.index_copy_(0, targets, self._counts[:n])
        self._tokens.index_copy_(0, targets, drawn)
        return drawn
