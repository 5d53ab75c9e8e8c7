"""The case list (cases.json) and the inputs of each case."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib import generator
from lib.compare import assert_close
from qwen1m_ext._host import build_info
from reference.rope import rope_table

PAGE_SIZE = 128
_FILE = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
SEEDS: dict[str, int] = _FILE["seeds"]
THETA: float = _FILE["rope_theta"]
BF16_PRODUCT_ISAS = ("avx512_bf16", "amx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Case = dict[str, Any]


def cases(op: str) -> list[Any]:
    """The cases of an op as pytest parameters, named by their id."""
    return [pytest.param(case, id=case["id"]) for case in _FILE[op]]


def case(op: str, name: str) -> Case:
    """One case by id."""
    return next(case for case in _FILE[op] if case["id"] == name)


def strided(values: Tensor, row_stride: int) -> Tensor:
    """The same values with rows `row_stride` elements apart; the gaps and the end hold NaN.

    A wrong stride then reads NaN, and `assert_gaps_untouched` sees a wrong write.
    """
    rows, inner = len(values), values[0].numel() if len(values) else 0
    if not rows:
        return values
    storage = torch.full((rows * row_stride + 64,), float("nan"), dtype=values.dtype)
    view = storage.as_strided(values.shape, (row_stride, *values.stride()[1:]))
    view.copy_(values)
    assert row_stride >= inner
    return view


def assert_gaps_untouched(view: Tensor) -> None:
    """Check that everything in the storage of a `strided` tensor outside of it is still NaN."""
    if not view.numel():
        return
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).clone()
    storage.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    assert torch.isnan(storage).all(), "a write went outside of the output rows"


@dataclass
class PagedCache:
    """Keys and values of several sequences in pages, in shuffled order; all the rest is NaN."""

    k_cache: Tensor  # [pages, kv_heads, 128, D]
    v_cache: Tensor
    block_table: Tensor  # [batch, max_pages] int32; entries past the sequence are out of range

    def slots(self, sequence: int, tokens: range) -> Tensor:
        """Slots (page * 128 + row) of some tokens of a sequence: [tokens] int64."""
        index = torch.arange(tokens.start, tokens.stop)
        page = self.block_table[sequence].long()[index // PAGE_SIZE]
        return page * PAGE_SIZE + index % PAGE_SIZE


def empty_cache(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, spare_pages: int = 2
) -> PagedCache:
    """A NaN-filled cache with pages for sequences of the given lengths (tokens)."""
    needed = [-(-length // PAGE_SIZE) for length in lengths]
    order = generator.shuffled(SEEDS["block_table"], sum(needed) + spare_pages)
    # An entry that must not be read is far outside of the cache: reading it is a crash, not luck.
    block_table = torch.full((len(lengths), max(needed, default=0) + 1), 2**31 - 1).int()
    for sequence, count in enumerate(needed):
        start = sum(needed[:sequence])
        block_table[sequence, :count] = torch.tensor(order[start : start + count]).int()
    shape = (len(order), kv_heads, PAGE_SIZE, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    return PagedCache(k_cache, v_cache, block_table)


def paged(k: list[Tensor], v: list[Tensor]) -> PagedCache:
    """Put keys and values [tokens, kv_heads, D] of each sequence into a NaN-poisoned cache."""
    if not k:
        return empty_cache([], 1, 64, torch.float32)
    cache = empty_cache([len(x) for x in k], *k[0].shape[1:], dtype=k[0].dtype)
    for sequence, (keys, values) in enumerate(zip(k, v, strict=True)):
        slots = cache.slots(sequence, range(len(keys)))
        cache.k_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = keys
        cache.v_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = values
    return cache


def spread(index: Tensor) -> Tensor:
    """The same values, not contiguous: every second element of twice as many."""
    return torch.stack((index, torch.full_like(index, -7)), dim=-1)[..., 0]


def arithmetic_of(dtype: str, device: str) -> str:
    """The arithmetic that attention has used, as the budgets name it.

    Where the hardware multiplies bf16 pairs, the rotated query and the probabilities are rounded
    to bf16, and the error of a logit grows with the logits.
    """
    rounds = device != "cpu" or build_info()["cpu_isa"] in BF16_PRODUCT_ISAS
    return "bf16_products" if dtype == "bf16" and rounds else dtype


def assert_attention(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    dtype: str,
    logit_factor: float = 1.0,
    device: str = "cpu",
) -> None:
    """Compare (out, lse) with float64 ones, within the budget of the arithmetic that was used."""
    arithmetic = arithmetic_of(dtype, device)
    factor = max(1.0, logit_factor) if arithmetic == "bf16_products" else 1.0
    assert_close(actual[0], expected[0], f"attention/{arithmetic}", "out", factor)
    assert_close(actual[1], expected[1], f"lse/{arithmetic}", "lse", factor)


@dataclass
class AttentionInputs:
    """Inputs of one attention case; `q` rows are those of all sequences, one after the other."""

    q: Tensor  # [rows, q_heads, D], un-rotated
    k: list[Tensor]  # per sequence [kv_len, kv_heads, D], rotated
    v: list[Tensor]
    q_len: list[int]
    logit_scale: Tensor  # [batch] float32; of decode_attention [batch, q_tokens]
    rope_table: Tensor  # [rows, D/2, 2] float32
    chunk_size: int
    local_size: int
    cache: PagedCache = field(init=False)

    def __post_init__(self) -> None:
        """Put the keys and values into pages."""
        self.cache = paged(self.k, self.v)
        if not self.k:  # no sequence: the cache still has the right heads
            heads, dim = self.q.shape[1:]
            self.cache = empty_cache([], heads, dim, self.q.dtype)

    @property
    def kv_len(self) -> Tensor:
        """[batch] int64."""
        return torch.tensor([len(k) for k in self.k], dtype=torch.int64)

    @property
    def cu_q(self) -> Tensor:
        """[batch + 1] int64."""
        return torch.tensor([0, *self.q_len], dtype=torch.int64).cumsum(0)

    def part(self, sequence: int, begin: int, end: int) -> AttentionInputs:
        """Query rows [begin, end) of one sequence, which then has no later token."""
        first = sum(self.q_len[:sequence])
        kv_len = len(self.k[sequence]) - self.q_len[sequence] + end
        scale = self.logit_scale[sequence : sequence + 1]
        return replace(
            self,
            q=self.q[first + begin : first + end],
            k=[self.k[sequence][:kv_len]],
            v=[self.v[sequence][:kv_len]],
            q_len=[end - begin],
            logit_scale=scale if scale.dim() == 1 else scale[:, begin:end],
        )


def attention_inputs(case: Case, dtype: torch.dtype) -> AttentionInputs:
    """The inputs of a prefill_attention or decode_attention case."""
    heads, kv_heads, dim = case["q_heads"], case["kv_heads"], case["head_dim"]
    kv_len = case["kv_len"]
    q_len = case["q_len"] if "q_len" in case else [case["q_tokens"]] * len(kv_len)
    chunk_len = case["chunk_size"] - case["local_size"]
    longest = max(kv_len, default=0)
    rows = longest if longest <= chunk_len else case["chunk_size"] + 1
    k, v = (
        [
            generator.tensor(SEEDS[name] + 100 * index, length, kv_heads, dim, dtype=dtype)
            for index, length in enumerate(kv_len)
        ]
        for name in ("k", "v")
    )
    # Different scales in one batch, so that a mix-up of sequences or rows cannot pass.
    scale = case["logit_factor"] * dim**-0.5 * (1 + 0.125 * torch.arange(len(kv_len)))
    if "q_tokens" in case:
        scale = scale[:, None] / (1 + 0.25 * torch.arange(case["q_tokens"]))
    return AttentionInputs(
        q=strided(
            generator.tensor(SEEDS["q"], sum(q_len), heads, dim, dtype=dtype),
            heads * dim + case["row_pad"],
        ),
        k=k,
        v=v,
        q_len=q_len,
        logit_scale=scale,
        rope_table=rope_table(THETA, dim, max(rows, 1)).float(),
        chunk_size=case["chunk_size"],
        local_size=case["local_size"],
    )
