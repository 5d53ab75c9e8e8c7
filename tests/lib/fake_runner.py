"""A runner without a model: it remembers what stands in every page and reads it back.

Writing a token notes (token, position, temperature); before the next token is drawn, the whole
sequence is read through its block table and must be what its tokens and temperatures say. So a page
that is shared wrongly, evicted too early, not copied or computed under another temperature shows.
The next token is a hash of all tokens before, so that a lost or repeated one changes all that
follow.
"""

from __future__ import annotations

import hashlib
from collections import deque

import torch

from qwen1m_ext.config import ModelConfig
from qwen1m_ext.cost_model import CostModel
from qwen1m_ext.kv_cache import KVCache
from qwen1m_ext.ops import PAGE_SIZE
from qwen1m_ext.prefix_cache import PrefixCache
from qwen1m_ext.request import SamplingParams
from qwen1m_ext.residency import Residency
from qwen1m_ext.scheduler import Limits, Scheduler
from qwen1m_ext.sequence import DENSE, AttentionPolicy, Request, Sequence, Step
from qwen1m_ext.sessions import Session

VOCAB = 97
EOS = 0  # ends the outputs whose max_tokens is odd


def next_token(tokens: list[int]) -> int:
    """The fake model: what follows these tokens."""
    return hashlib.blake2b(bytes(tokens), digest_size=4).digest()[0] % VOCAB


def continuation(prompt: list[int], index: int, max_tokens: int) -> list[int]:
    """What sample `index` of a prompt must give."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append((next_token(tokens) + index) % VOCAB)
        if tokens[-1] == EOS and max_tokens % 2:
            break
    return tokens[len(prompt) :]


def temperature(tokens: int) -> float:
    """s(n) of a model trained on 300 tokens."""
    return 1.0 if tokens <= 300 else 1.0 + tokens / 1000


class NotingCache(KVCache):
    """A cache of a few numbers that keeps notes of what is in its pages."""

    def __init__(self, config: ModelConfig, pages: int, max_seqs: int) -> None:
        super().__init__(config, torch.float32, pages * PAGE_SIZE, max_seqs)
        self.notes: list[list[object]] = [[None] * PAGE_SIZE for _ in range(pages)]

    def copy_page(self, source: int, target: int) -> None:
        self.notes[target] = list(self.notes[source])


class World:
    """Scheduler, fake runner and fake output processor, two steps in flight."""

    def __init__(
        self, config: ModelConfig, limits: Limits, pages: int = 16, delay: int = 1
    ) -> None:
        """`delay`: results of so many steps pile up before the output processor looks at them."""
        self.cache = NotingCache(config, pages, limits.max_num_seqs + 4)
        self.prefixes = PrefixCache(self.cache.allocator, b"model")
        self.cost = CostModel(config)
        self.residency = Residency(self.cache, self.prefixes, temperature, limits.max_num_seqs)
        self.scheduler = Scheduler(self.residency, self.cost, limits)
        self.delay, self.arrivals = delay, 0
        self.flying: deque[Step] = deque()
        self.pending: deque[list[tuple[Sequence, int]]] = deque()
        self.outputs: dict[Sequence, list[int]] = {}
        self.finished: set[Sequence] = set()
        self.steps: list[Step] = []
        self.computed = 0  # tokens that went through the fake model

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        n: int = 1,
        priority: int = 0,
        session: Session | None = None,
        policy: AttentionPolicy = DENSE,
        pin: bool = False,
    ) -> Request:
        self.arrivals += 1
        request = Request(
            f"r{self.arrivals}", prompt, SamplingParams(n=n, max_tokens=max_tokens),
            arrival=self.arrivals, priority=priority, temperature=temperature(len(prompt)),
            session=session, policy=policy, pin=pin,
        )  # fmt: skip
        request.samples = [Sequence(request, i, max_tokens) for i in range(n)]
        for sequence in request.samples:
            self.outputs[sequence] = []
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        request.stop()
        self.residency.cancel(request)

    def step(self) -> bool:
        """Plan up to two steps, run one; False if there was nothing to do."""
        while len(self.flying) < 2 and (step := self.scheduler.plan()) is not None:
            self.flying.append(step)
        busy = bool(self.flying)
        if self.flying:
            self._run(self.flying.popleft())
        while self.pending and (len(self.pending) > self.delay or not self.flying):
            busy = True
            self._look_at(self.pending.popleft())
        return busy

    def run(self, limit: int = 20_000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"still busy after {limit} steps")

    def _run(self, step: Step) -> None:
        self.steps.append(step)
        sampled, done = [], set()
        for piece in step.pieces:
            sequence = piece.sequence
            if sequence.request.stopped:
                continue
            self._write(sequence, piece.begin, piece.end)
            done.add(sequence)
            self.computed += piece.end - piece.begin
            if piece.sample:
                self._read(sequence, piece.end)
                token = (next_token(sequence.tokens[: piece.end]) + sequence.index) % VOCAB
                assert piece.end == len(sequence.tokens), "a token was sampled twice or skipped"
                sequence.tokens.append(token)
                sampled.append((sequence, token))
        self.pending.append(sampled)
        self.scheduler.retire(step, frozenset(done), None)

    def _write(self, sequence: Sequence, begin: int, end: int) -> None:
        assert sequence.cache is not None
        table = sequence.cache.block_table[0].tolist()
        for position in range(begin, end):
            page = table[position // PAGE_SIZE]
            assert self.cache.allocator.users(page) == 1, "wrote into a page of several users"
            self.cache.notes[page][position % PAGE_SIZE] = self._what(sequence, position)

    def _read(self, sequence: Sequence, end: int) -> None:
        assert sequence.cache is not None
        table = sequence.cache.block_table[0].tolist()
        for position in range(end):
            note = self.cache.notes[table[position // PAGE_SIZE]][position % PAGE_SIZE]
            assert note == self._what(sequence, position)

    def _what(self, sequence: Sequence, position: int) -> tuple[int, int, float]:
        s = self.residency.temperature(sequence, position)
        return sequence.tokens[position], position, s

    def _look_at(self, sampled: list[tuple[Sequence, int]]) -> None:
        for sequence, token in sampled:
            if sequence in self.finished or sequence.request.stopped:
                continue
            outputs = self.outputs[sequence]
            outputs.append(token)
            if (token == EOS and sequence.max_tokens % 2) or len(outputs) == sequence.max_tokens:
                self.finished.add(sequence)
                self.residency.finish(sequence, len(outputs))
