"""Which sequences have their tokens in the cache: admission, preemption, release, reuse.

A sequence is waiting (no cache) or running. It is admitted when its prompt finds room beside what
the running ones were promised; when a running one finds no page for its next token, the last in
order gives way: its pages go back, labelled, and it waits again with all its tokens.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable

from .errors import MemoryBudgetError, RequestError
from .kv_cache import KVCache, pages_for
from .ops import PAGE_SIZE
from .prefix_cache import PrefixCache, extend_keys
from .sequence import Request, Sequence
from .sessions import Session

MAX_OVERTAKEN = 64
"""Admissions that may pass a request that waits for memory before it holds the queue."""


class Residency:
    """Waiting and running sequences, and their pages. Not thread-safe."""

    def __init__(
        self,
        cache: KVCache,
        prefixes: PrefixCache,
        temperature_at: Callable[[int], float],
        max_num_seqs: int,
    ) -> None:
        """As `Scheduler`."""
        self.cache, self.prefixes = cache, prefixes
        self.waiting: list[Sequence] = []  # in order of service
        self.running: list[Sequence] = []
        self.released: list[Sequence] = []  # for the caller to take
        self.preemptions = self.discarded = 0
        self._temperature_at, self._max_num_seqs = temperature_at, max_num_seqs
        self._overtaken = 0

    def wait(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=lambda s: s.key)

    def startable(self) -> list[Sequence]:
        """Waiting sequences that can be admitted as far as their number goes, in order."""
        room = self._max_num_seqs - len(self.running)
        if room < 1:
            return []
        samples: Counter[Request] = Counter()  # more than fit are not looked at, step by step
        result = []
        for sequence in self.waiting:
            if samples[sequence.request] < room and self.may_start(sequence):
                samples[sequence.request] += 1
                result.append(sequence)
        return result

    def cancel(self, request: Request) -> None:
        """Stop a request that is marked as stopped; what it computed stays cached."""
        for sequence in [s for s in self.waiting if s.request is request]:
            self._drop(sequence)
        for sequence in [s for s in self.running if s.request is request]:
            self.settle(sequence)

    def finish(self, sequence: Sequence, outputs: int) -> None:
        """A sample is complete with so many output tokens."""
        if sequence.final_outputs is None:
            sequence.final_outputs = outputs
        if sequence in self.waiting:  # preempted after its last token was sampled
            self._drop(sequence)
        elif sequence in self.running:
            self.settle(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self._released(sequence)

    def may_start(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence is not waiting for another one."""
        request = sequence.request
        if request.session is not None and sequence.is_leader and request.session.busy:
            return False
        if request.stopped or sequence.complete:
            return False
        return sequence.is_leader or request.prefilled

    def admit(self, sequence: Sequence) -> bool:
        """Open a waiting sequence with what is cached of it, if its prompt finds room."""
        request = sequence.request
        if len(self.running) >= self._max_num_seqs:
            return False
        if not self.may_start(sequence):  # no longer: stopped, or its session has become busy
            return False
        head = next(s for s in self.waiting if self.may_start(s))
        if self._overtaken >= MAX_OVERTAKEN and sequence is not head:
            return False
        session = request.session if sequence.is_leader else None
        if session is not None and session.closed:
            request.fail(RequestError("session: expected an open one, got a closed one"))
            self.cancel(request)
            return False
        if session is None and not self.cache.free_rows:
            return self._blocked(sequence)
        self._prepare_keys(sequence)
        pages, forked = self._reusable(sequence)
        held = max(len(pages), forked // PAGE_SIZE)
        if session is not None:
            held = max(held, len(session.sequence.pages))
        promised = sum(
            max(0, pages_for(s.total) - len(s.cache.pages)) for s in self.running if s.cache
        )
        needed = pages_for(sequence.total + 1) - held
        if needed > self.cache.allocator.num_free - promised:
            self.cache.allocator.free(pages)
            return self._blocked(sequence)
        if session is not None:
            self._open_session(sequence, session, pages)
        else:
            sequence.cache = self.cache.open()
            if forked and request.leader.cache is not None:
                sequence.cache.fork(request.leader.cache, forked)
            else:
                sequence.cache.share(pages, len(pages) * PAGE_SIZE)
        self._overtaken = 0 if sequence is head else self._overtaken + 1
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.computed = sequence.length
        sequence.offered = 0
        if sequence.is_leader and not sequence.preemptions:
            request.cached = request.metrics.cached_tokens = sequence.length
            request.done = float(sequence.length)
        return True

    def _reusable(self, sequence: Sequence) -> tuple[list[int], int]:
        """(cached pages, taken; or tokens to fork from the leader) of a waiting sequence."""
        request, leader = sequence.request, sequence.request.leader
        most = len(sequence.tokens) - 1  # the last one has to run
        fresh = sequence is not leader and sequence.planned_outputs == 0
        if fresh and leader.cache is not None and leader.root == sequence.root:
            return [], request.policy.last_stop(most)
        if request.on_hidden is not None and sequence is leader:  # every row has to run
            return [], 0
        pages = self.prefixes.match(sequence.keys, most)
        keep = request.policy.last_page_stop(len(pages))
        self.cache.allocator.free(pages[keep:])
        return pages[:keep], 0

    def _open_session(self, sequence: Sequence, session: Session, pages: list[int]) -> None:
        """Start a sequence on its session's tokens, or on matched pages if these reach farther."""
        request = sequence.request
        if request.on_hidden is not None:
            session.truncate(0)
        reused, _ = session.begin(sequence.tokens, request.temperature, request.policy.name)
        reused = request.policy.last_stop(reused)
        sequence.cache = session.sequence
        if len(pages) * PAGE_SIZE > reused:
            session.truncate(0)
            sequence.cache.share(pages, len(pages) * PAGE_SIZE)
        else:
            session.truncate(reused)
            self.cache.allocator.free(pages)

    def _prepare_keys(self, sequence: Sequence) -> None:
        """Keys of the sequence's full pages, under the temperature that it will have."""
        request = sequence.request
        temperature, session = request.temperature, request.session
        if request.frozen and session is not None and session.temperature is not None:
            temperature = session.temperature
        if not sequence.root or temperature != sequence.temperature:
            sequence.temperature, sequence.keys = temperature, []
            sequence.root = self.prefixes.root(temperature, request.policy.name)
            if sequence.root == request.root:
                sequence.keys = list(request.keys)
        extend_keys(sequence.keys, sequence.root, sequence.tokens, self._uniform_end(sequence))

    def _blocked(self, sequence: Sequence) -> bool:
        """No room for a waiting sequence. Nobody will make any if nothing runs: it fails."""
        if not self.running:
            free, pool = self.cache.allocator.num_free, self.cache.num_pages
            sequence.request.fail(
                MemoryBudgetError(
                    f"kv cache: expected {pages_for(sequence.total + 1)} free pages and a free "
                    f"row, got {free} of {pool} pages and {self.cache.free_rows} rows: open "
                    "sessions and pinned prefixes hold the others"
                )
            )
            self.cancel(sequence.request)
        return False

    def reserve(self, sequence: Sequence, count: int, planned: set[Sequence]) -> bool:
        """Take pages for `count` more tokens; if there are too few, somebody has to give way."""
        while sequence.cache is not None:
            try:
                sequence.cache.append(count)
                return True
            except MemoryBudgetError as error:
                others = [s for s in self.running if s is not sequence]
                if any(s.stopping or s.complete for s in others):
                    return False  # pages are on their way back
                if not others:
                    sequence.request.fail(error)
                    self.cancel(sequence.request)
                    return False
                later = [s for s in others if s.key > sequence.key and s not in planned]
                victim = max(later, key=lambda s: s.key, default=sequence)
                victim.preempting = True
                self.settle(victim)
                if victim.cache is not None:
                    return False  # its pages come back after its step in flight
        return False

    def settle(self, sequence: Sequence) -> None:
        """Give back what a stopping sequence holds, once no step needs it."""
        cache, request = sequence.cache, sequence.request
        if sequence.in_flight or cache is None:
            return
        keep = sequence.computed
        if sequence.final_outputs is not None:
            keep = min(keep, sequence.prompt_len + sequence.final_outputs - 1)
            self.discarded += len(sequence.tokens) - sequence.prompt_len - sequence.final_outputs
        uniform = min(keep, self._uniform_end(sequence))
        preempted = sequence.preempting and sequence.final_outputs is None and not request.stopped
        sequence.cache = None
        self.running.remove(sequence)
        if request.session is not None and sequence.is_leader:
            outputs = sequence.final_outputs
            end = 0 if outputs is None else sequence.prompt_len + outputs
            kept = 0 if preempted else uniform
            request.session.end(sequence.tokens[:kept], sequence.tokens[kept:end])
        else:
            cache.truncate(keep)
            self.cache.close(cache)
        sequence.computed = 0
        if preempted:
            self.preemptions += 1
            sequence.preemptions += 1
            sequence.preempting = False
            sequence.total = len(sequence.tokens)
            self.wait(sequence)
        else:
            self._released(sequence)

    def _released(self, sequence: Sequence) -> None:
        sequence.released = True
        self.released.append(sequence)

    def offer(self, sequence: Sequence) -> None:
        """Let others find the pages that are complete."""
        end = min(sequence.computed, self._uniform_end(sequence))
        count = end // PAGE_SIZE
        if sequence.cache is not None and count > sequence.offered:
            extend_keys(sequence.keys, sequence.root, sequence.tokens, end)
            self.prefixes.offer(sequence.keys[:count], sequence.cache.pages, sequence.offered)
            sequence.offered = count

    def _uniform_end(self, sequence: Sequence) -> int:
        """Tokens from the beginning that any prompt of this root would compute alike."""
        policy, n = sequence.request.policy, len(sequence.tokens)
        if policy.sparse:  # the last segment's selection depends on where the prompt ends
            return policy.last_stop(sequence.prompt_len)
        same = self.temperature(sequence, n - 1) == sequence.temperature
        return n if same else sequence.prompt_len

    def temperature(self, sequence: Sequence, position: int) -> float:
        """S under which the token at a position is computed."""
        if sequence.request.frozen:
            return sequence.temperature
        return self._temperature_at(max(sequence.prompt_len, position + 1))

    def prefilled(self, leader: Sequence) -> None:
        """A prompt is in the cache: its other samples may start."""
        request = leader.request
        if request.pin and not request.prefilled:
            try:
                self.prefixes.pin(request.request_id, leader.keys[: leader.prompt_len // PAGE_SIZE])
            except RequestError as error:
                request.fail(error)
        request.prefilled = True
