"""CPU attention against torch SDPA in both of its forms, and decode against reading the cache.

    python bench/attention_cpu.py [--pairs 5] [--threads 2] [--max-tflop 10]
        [--prefill 8192 32768] [--decode 32768 131072] [--cold-mib 256]

Both peers get contiguous keys; one is scaled_dot_product_attention with enable_gqa=True on the KV
heads, the other has keys and values expanded to the query heads beforehand (the copy is not timed).
Prefill reads pages in random order; decode reads them in the order of memory, as the engine gives
them to a prompt, and in random order. The peer for decode's bandwidth is a sum over the very bytes
of the two caches, from front to back. In decode both take the next of several equal caches at each
call, together at least --cold-mib, as the layers of a model do: the bytes come from memory, not
from the last call's L3. (SDPA always gets the same ones.) Rotary angles are 0, because SDPA rotates
nothing. Outputs are compared before anything is timed. Writes attention_prefill.json and
attention_decode.json to bench/results/cpu, each if it has rows: either half can be run alone, with
the other's list of lengths left empty. bench/cpu_peak.cpp measures the processor's peak, for
percentages.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from paired import compare, environment, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen1m_ext import huge_pages, ops

PAGE = 128
# (query heads, KV heads, head_dim): the demo model's group, Qwen2.5-7B's.
HEADS = [(4, 2, 64), (28, 4, 128)]


@dataclass
class Case:
    """One sequence of `tokens` tokens, in pages and as the contiguous tensors of SDPA."""

    q: Tensor  # [q_tokens, q_heads, D]
    k: Tensor  # [1, kv_heads, tokens, D]
    v: Tensor
    caches: list[tuple[Tensor, Tensor]]  # k and v, each [pages, kv_heads, 128, D]: equal copies
    block_table: Tensor
    out: Tensor
    rope_table: Tensor

    def __post_init__(self) -> None:
        # Half a round apart, so that neither finds in L3 what the other has just read.
        half = len(self.caches) // 2
        self._next = itertools.cycle(self.caches)
        self._next_read = itertools.cycle(self.caches[half:] + self.caches[:half])
        # A model has them for all layers of a step.
        self._lengths = torch.tensor([self.tokens])
        self._cu_q = torch.tensor([0, len(self.q)])
        self._scale = torch.tensor([1 / math.sqrt(self.q.shape[2])])

    @property
    def tokens(self) -> int:
        """Keys."""
        return self.k.shape[2]

    def ours(self) -> Tensor:
        """prefill_attention, or decode_attention for one query token; [q_tokens, q_heads, D]."""
        common = (*next(self._next), self.block_table)
        lengths, scale, cu_q = self._lengths, self._scale, self._cu_q
        positions = (self.rope_table, ops.INFINITE_CHUNK, 0)
        if len(self.q) == 1:
            out, q = self.out[None], self.q[None]
            ops.decode_attention(out, None, q, *common, lengths, scale[None], *positions)
        else:
            ops.prefill_attention(self.out, None, self.q, *common, cu_q, lengths, scale, *positions)
        return self.out

    def sdpa(self, expanded: bool) -> Callable[[], Tensor]:
        """A function that does the same with torch; the result is [1, q_heads, q_tokens, D]."""
        q, k, v = self.q.transpose(0, 1)[None].contiguous(), self.k, self.v
        if expanded:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        causal = len(self.q) > 1
        return lambda: scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=not expanded
        )

    def in_small_pages(self) -> Callable[[], Tensor]:
        """`ours` on copies of the caches that did not ask for huge pages."""
        caches = [(k.clone(), v.clone()) for k, v in self.caches]
        return replace(self, caches=caches).ours

    def read(self) -> float:
        """Sum a cache's bytes as fp32."""
        return sum(float(t.view(torch.float32).sum()) for t in next(self._next_read))


def make_case(
    tokens: int,
    q_tokens: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    in_order: bool = False,
    cold_bytes: int = 0,
) -> Case:
    """Random values; pages in the order of memory or in random order.

    `cold_bytes`: of caches that decode goes through before it meets the same one again.
    """
    q_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    k, v = (random(1, kv_heads, tokens, dim) for _ in range(2))
    block_table = torch.randperm(tokens // PAGE, generator=generator).int()
    if in_order:
        block_table = block_table.sort().values

    def pages(x: Tensor) -> Tensor:
        cache = huge_pages.empty((tokens // PAGE, kv_heads, PAGE, dim), dtype)
        cache[block_table.long()] = x[0].unflatten(1, (-1, PAGE)).transpose(0, 1)
        return cache

    q = random(q_tokens, q_heads, dim)
    rope_table = torch.tensor([1.0, 0.0]).expand(tokens, dim // 2, 2).contiguous()
    copies = 1 if q_tokens > 1 else max(2, -(-cold_bytes // (k.nbytes + v.nbytes)))
    caches = [(pages(k), pages(v)) for _ in range(copies)]
    return Case(q, k, v, caches, block_table[None], torch.empty_like(q), rope_table)


def check(case: Case) -> None:
    """Refuse to time a wrong result."""
    expected = case.sdpa(expanded=True)()[0].transpose(0, 1)
    error = (case.ours().float() - expected.float()).abs().max().item()
    if not error < 0.03:
        raise SystemExit(f"outputs differ from SDPA by {error}")


def measure(
    case: Case, pairs: int, what: str, dtype: torch.dtype, in_order: bool = False
) -> list[dict[str, Any]]:
    """Rows for one case, printed as they come."""
    check(case)
    q_tokens, q_heads, dim = case.q.shape
    shape = {
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "heads": f"{q_heads}/{case.k.shape[1]}",
        "head_dim": dim,
        "pages": "in order" if in_order else "random order",
    }
    # 2 products of 2 operations over the visible (query, key) pairs; bytes of keys and values.
    flops = 4 * dim * q_heads * (case.tokens * q_tokens - q_tokens * (q_tokens - 1) / 2)
    data, k_bytes = sum(t.nbytes for t in case.caches[0]), case.k.nbytes
    peers: dict[str, Callable[[], object]] = {}
    if what == "decode":
        peers["read the cache"] = case.read
        shape["caches"] = len(case.caches)
        if k_bytes >= huge_pages.MIN_BYTES:
            peers["ours, 4 KiB pages"] = case.in_small_pages()
    peers["sdpa enable_gqa"] = case.sdpa(expanded=False)
    peers["sdpa expanded"] = case.sdpa(expanded=True)
    rows = []
    for name, peer in peers.items():
        row = shape | {"peer": name} | compare(case.ours, peer, pairs)
        unit, work = ("GB/s", data) if what == "decode" else ("GFLOP/s", flops)
        row |= {"unit": unit, "rate": work / row["ours_s"] / 1e9}
        rows.append(row)
        print(
            f"{what:8} {shape['dtype']:8} {case.tokens:7} tokens {shape['heads']:>5} x {dim:<3} "
            f"| {shape['pages']:12} | ours {row['ours_s'] * 1e3:9.2f} ms {row['rate']:7.1f} {unit} "
            f"| {name:17} {row['peer_s'] * 1e3:9.2f} ms "
            f"| x {row['ratio']:.2f} ({row['ratio_min']:.2f} .. {row['ratio_max']:.2f})",
            flush=True,
        )
    return rows


def main() -> None:
    """Run the cases and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=5, help="of prefill; decode takes 5 times as many"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 32768], help="tokens")
    parser.add_argument("--decode", type=int, nargs="*", default=[32768, 131072], help="tokens")
    parser.add_argument("--max-tflop", type=float, default=10, help="leave out longer prefills")
    parser.add_argument("--cold-mib", type=int, default=256, help="of caches, in turn, in decode")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    bf16, fp32 = torch.bfloat16, torch.float32
    start = environment()
    rows = []
    prefill = [(tokens, heads, bf16) for heads in HEADS for tokens in arguments.prefill]
    prefill += [(tokens, HEADS[0], fp32) for tokens in arguments.prefill[:1]]
    for tokens, heads, dtype in prefill:
        if 2e-12 * tokens**2 * heads[0] * heads[2] <= arguments.max_tflop:
            case = make_case(tokens, tokens, heads, dtype)
            rows += measure(case, arguments.pairs, "prefill", dtype)
    for heads in HEADS:
        for tokens in arguments.decode:
            for in_order in (True, False):
                case = make_case(tokens, 1, heads, bf16, in_order, arguments.cold_mib << 20)
                rows += measure(case, 5 * arguments.pairs, "decode", bf16, in_order)
    for what in ("prefill", "decode"):
        if of_this := [row for row in rows if row["what"] == what]:
            print(write(f"cpu/attention_{what}", start, of_this))


if __name__ == "__main__":
    main()
