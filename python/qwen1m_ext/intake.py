"""From a prompt to a request: what is refused, and how the rest is prefilled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .assembly import Parts
from .device import StreamDevice
from .errors import ContextTooLong, MemoryBudgetError, RequestError
from .kv_cache import pages_for
from .memory import format_bytes
from .ops import PAGE_SIZE
from .plan import Deployment
from .prefill_policy import PrefillPolicy
from .prefix_cache import PrefixCache, extend_keys
from .request import SamplingParams
from .sequence import DENSE, AttentionPolicy, OnHidden, Request
from .sequence import Sequence as Sample
from .sessions import Session
from .sparsity import SparseAttention, SparsePrefill


class Intake:
    """Makes the requests of one engine. Every method may be called from any thread."""

    def __init__(
        self,
        parts: Parts,
        policy: PrefillPolicy,
        deployment: Deployment,
        prefixes: PrefixCache,
        has_tokenizer: bool,
    ) -> None:
        """For an engine of these parts; `has_tokenizer`: whether text can be looked at."""
        self._parts, self._policy, self._prefixes = parts, policy, prefixes
        self._max_model_len, self._chunk_tokens = deployment.tokens, deployment.chunk
        self._has_tokenizer = has_tokenizer
        self._numbers = itertools.count(1)

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """As `Engine.check`."""
        if not token_ids:
            raise RequestError("prompt: expected at least one token, got an empty prompt")
        vocab, longest = self._parts.model.config.vocab_size, self._max_model_len
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise RequestError(f"prompt_token_ids: expected ids in [0, {vocab}), got {bad}")
        if len(token_ids) >= longest:
            raise ContextTooLong(
                f"prompt: expected at most {longest - 1} tokens (max_model_len "
                f"{longest} less one new token), got {len(token_ids)}; "
                "nothing was truncated"
            )
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(params, name) or ():
                if token >= vocab:
                    raise RequestError(f"{name}: expected token ids in [0, {vocab}), got {token}")
        self._sparse_for(len(token_ids), params)
        if params.stop_list and not self._has_tokenizer:
            raise RequestError("stop: expected none, as no tokenizer is loaded, got strings")
        tokens = min(len(token_ids) + (params.max_tokens or longest), longest)
        cache = self._parts.cache
        needed = pages_for(tokens) * cache.page_bytes
        # the host's memory is taken page by page, a GPU's was taken when the engine started
        on_gpu = isinstance(cache.device, StreamDevice)
        available = None if on_gpu else cache.device.available_bytes()
        if available is not None and needed > available:
            raise MemoryBudgetError(
                f"request: the KV cache of {tokens} tokens needs {needed} bytes "
                f"({format_bytes(needed)}), but {available} bytes are available"
            )

    def _sparse_for(self, prompt_tokens: int, params: SamplingParams) -> SparseAttention | None:
        """How this prompt is prefilled; None: densely. Raises RequestError if that cannot be."""
        sparse = self._parts.sparse
        if not self._policy.is_sparse(params.attention, prompt_tokens):
            return None
        if sparse is None:
            raise RequestError('attention: expected "dense", as the engine is, got "sparse"')
        needed = min(prompt_tokens, sparse.settings.window_tokens)
        if self._chunk_tokens < needed:
            raise RequestError(
                f"attention: sparse prefill of {prompt_tokens} tokens needs "
                f"prefill_chunk_tokens of at least {needed}, got {self._chunk_tokens}"
            )
        return sparse

    def request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
        session: Session | None = None,
        pin: bool = False,
        on_hidden: OnHidden | None = None,
    ) -> Request:
        """A checked prompt with its samples; they have no sampler yet.

        Args: as `Engine.submit`; `on_hidden`: takes the prompt's final hidden states.

        Raises:
            RequestError: the pin would be too large.
        """
        number = next(self._numbers)
        sparse, policy = self._sparse_for(len(token_ids), params), DENSE
        if sparse:
            policy = AttentionPolicy(sparse.key, sparse.grid.window_tokens, sparse.grid.border)
        request = Request(
            request_id or f"request-{number}",
            token_ids,
            params,
            arrival=number,
            priority=priority,
            temperature=self._parts.rotary.dual_chunk.temperature(len(token_ids)),
            session=session,
            policy=policy,
            sparse=SparsePrefill.start(sparse) if sparse else None,
            on_hidden=on_hidden,
            pin=pin,
        )
        if pin:
            self._prefixes.check_pin(len(token_ids) // PAGE_SIZE)
        request.root = self._prefixes.root(request.temperature, request.policy.name)
        extend_keys(request.keys, request.root, token_ids, len(token_ids))
        room = self._max_model_len - len(token_ids)
        max_tokens = min(params.max_tokens or room, room)
        request.samples = [Sample(request, i, max_tokens) for i in range(params.n)]
        return request
