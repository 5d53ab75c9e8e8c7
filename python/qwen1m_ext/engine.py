"""The engine: a loaded model and the life of a request, from token ids to finished samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .attention import Rotary
from .config import PLAIN_ROPE, DualChunkConfig, ModelConfig, load_config, load_generation_config
from .decode import decode_step
from .errors import BackendError, ConfigError, ContextTooLong, MemoryBudgetError, RequestError
from .kv_cache import KVCache, pages_for
from .memory import available_bytes, format_bytes
from .model import Qwen2Model, logits_rows
from .output import OutputBuilder
from .plan import Deployment, fit_context, memory_plan
from .prefill import PREFILL_CHUNK_TOKENS, OnProgress, prefill
from .request import RequestMetrics, RequestOutput, SamplingParams, TokenLogprobs
from .sampler import Sampler, top_logprobs
from .sessions import Session
from .tokenizer import Tokenizer
from .weights import load_weights

log = logging.getLogger(__name__)

DTypeName = Literal["auto", "bfloat16", "float32"]
RopeName = Literal["auto", "dca", "plain"]

MAX_SEQUENCES = 8
"""Sessions that may be open at once. They share the pages of one full context."""


class Engine:
    """A model, its cache and its tokenizer, serving one request at a time."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: DTypeName = "auto",
        max_model_len: int | None = None,
        device: str = "auto",
        rope: RopeName = "auto",
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        load_tokenizer: bool = True,
    ) -> None:
        """Load a checkpoint and reserve its cache.

        Args:
            model_dir: a Hugging Face Qwen2 checkpoint directory.
            dtype: of weights, activations and cache; "auto": as stored.
            max_model_len: most tokens of prompt plus output; None: the model's maximum, or what
                memory holds if that is less (reported as a warning).
            device: "auto" or "cpu"; "cuda" when the package was built with CUDA kernels.
            rope: "auto": as the config says; "dca": refuse a config without Dual Chunk Attention;
                "plain": ignore it, to see what it is for.
            prefill_chunk_tokens: tokens per prefill chunk.
            load_tokenizer: False: token ids in, token ids out.

        Raises:
            ConfigError, WeightsError: the checkpoint, or an argument above, does not fit.
            MemoryBudgetError: `max_model_len` tokens do not fit in memory.
            BackendError: the device is not available.
        """
        self.model_dir = Path(model_dir)
        self.device = _choose_device(device)
        self.config = load_config(model_dir)
        self.generation_config = load_generation_config(model_dir)
        self.tokenizer = Tokenizer(model_dir) if load_tokenizer else None
        if self.tokenizer and self.tokenizer.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"{model_dir}: tokenizer.json has {self.tokenizer.vocab_size} tokens, "
                f"but config.json says vocab_size {self.config.vocab_size}"
            )
        self.dtype = _choose_dtype(dtype, self.config)
        self.dual_chunk = _choose_rope(rope, self.config, str(model_dir))
        if prefill_chunk_tokens < 1:
            raise ConfigError(f"prefill_chunk_tokens: expected >= 1, got {prefill_chunk_tokens}")
        deployment = Deployment(
            tokens=0,
            dtype=self.dtype,
            weights_dtype=self.dtype,
            kv_dtype=self.dtype,
            chunk_tokens=prefill_chunk_tokens,
            max_seqs=MAX_SEQUENCES,
        )
        shape = replace(self.config, dual_chunk=self.dual_chunk)
        self.max_model_len = fit_context(shape, deployment, max_model_len, available_bytes())
        self.plan = memory_plan(shape, replace(deployment, tokens=self.max_model_len))
        weights = load_weights(model_dir, self.config, self.dtype)
        self.chunk_tokens = min(prefill_chunk_tokens, self.max_model_len)
        self.rotary = Rotary.build(self.config, self.dual_chunk, self.max_model_len)
        self.model = Qwen2Model(self.config, weights, self.chunk_tokens)
        self.cache = KVCache(self.config, self.dtype, self.max_model_len, max_seqs=MAX_SEQUENCES)
        self.eos_token_ids = frozenset(
            self.generation_config.eos_token_ids or self.config.eos_token_ids
        )
        for token in self.eos_token_ids:
            if token >= self.config.vocab_size:
                raise ConfigError(
                    f"{model_dir}: eos_token_id: expected ids below vocab_size "
                    f"{self.config.vocab_size}, got {token}"
                )
        self._requests = 0

    def default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends, with vLLM's default of 16 tokens."""
        return SamplingParams.from_defaults(self.generation_config, max_tokens=16)

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what cannot be served, before any work is done.

        Raises:
            RequestError: empty prompt, a token outside the vocabulary (of the prompt or of the
                sampling parameters), stop strings without a tokenizer.
            ContextTooLong: no room for the prompt and one new token.
            MemoryBudgetError: the pages of this request do not fit in memory now.
        """
        if not token_ids:
            raise RequestError("prompt: expected at least one token, got an empty prompt")
        vocab = self.config.vocab_size
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise RequestError(f"prompt_token_ids: expected ids in [0, {vocab}), got {bad}")
        if len(token_ids) >= self.max_model_len:
            raise ContextTooLong(
                f"prompt: expected at most {self.max_model_len - 1} tokens (max_model_len "
                f"{self.max_model_len} less one new token), got {len(token_ids)}; "
                "nothing was truncated"
            )
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(params, name) or ():
                if token >= vocab:
                    raise RequestError(f"{name}: expected token ids in [0, {vocab}), got {token}")
        if params.stop_list and self.tokenizer is None:
            raise RequestError("stop: expected none, as no tokenizer is loaded, got strings")
        tokens = min(len(token_ids) + (params.max_tokens or vocab), self.max_model_len)
        needed = pages_for(tokens) * self.cache.page_bytes
        available = available_bytes()
        if available is not None and needed > available:
            raise MemoryBudgetError(
                f"request: the KV cache of {tokens} tokens needs {needed} bytes "
                f"({format_bytes(needed)}), but {available} bytes are available"
            )

    def stream(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        on_progress: OnProgress | None = None,
        session: Session | None = None,
    ) -> Iterator[RequestOutput]:
        """Serve a request; yields its state after every token, the last one `finished`.

        The `n` samples are generated one after the other: each starts from the prompt's cache, cut
        back to the prompt's length, so no copy is made. Closing the iterator aborts the request.
        With a session, what its cache has of the prompt is not computed again.

        Raises:
            As `check`, before the first token.
        """
        token_ids = list(token_ids)
        self.check(token_ids, params)
        self._requests += 1
        result = RequestOutput(f"request-{self._requests}", prompt, token_ids, [])
        result.metrics.prompt_tokens = len(token_ids)
        used = session or Session(self.cache)
        try:
            with torch.inference_mode():
                logits = self._prefill(used, token_ids, params, result, on_progress)
            yield from self._samples(used, logits, params, result)
        finally:
            if session is None:
                used.close()

    def open_session(self, *, freeze_temperature: bool = False) -> Session:
        """A cache that several requests share, for turns of a conversation; see `Session`."""
        return Session(self.cache, freeze_temperature)

    def _prefill(
        self,
        session: Session,
        token_ids: list[int],
        params: SamplingParams,
        result: RequestOutput,
        on_progress: OnProgress | None,
    ) -> Tensor:
        """Run the prompt; returns [vocab] logits of the first new token."""
        start = time.perf_counter()
        if params.prompt_logprobs is not None:
            session.truncate(0)  # every row has to run
        reused, temperature = session.begin(token_ids, self.dual_chunk.temperature(len(token_ids)))
        result.metrics.cached_tokens = reused
        on_hidden = None
        if params.prompt_logprobs is not None:
            result.prompt_logprobs = [None]
            collected = result.prompt_logprobs
            count = params.prompt_logprobs

            def on_hidden(begin: int, hidden: Tensor) -> None:
                following = token_ids[begin + 1 : begin + 1 + len(hidden)]
                collected.extend(self._row_logprobs(hidden[: len(following)], following, count))

        try:
            hidden = prefill(
                self.model,
                self.rotary,
                self.cache,
                session.sequence,
                token_ids,
                temperature=temperature,
                chunk_tokens=self.chunk_tokens,
                on_progress=on_progress,
                on_hidden=on_hidden,
            )
        finally:  # also when cancelled: a session goes on from the chunks that are complete
            session.extend(token_ids[reused : session.sequence.length], temperature)
        logits = self.model.logits(hidden)[0]
        result.metrics.prefill_seconds = time.perf_counter() - start
        return logits

    def _row_logprobs(
        self, hidden: Tensor, following: list[int], count: int
    ) -> Iterator[TokenLogprobs]:
        """Log probabilities of the token after each hidden row, a block of rows at a time."""
        rows = logits_rows(self.config)
        for begin in range(0, len(following), rows):
            logits = self.model.logits(hidden[begin : begin + rows])
            chosen = torch.tensor(following[begin : begin + rows])
            yield from top_logprobs(logits, chosen, count, self.tokenizer)

    def _samples(
        self,
        session: Session,
        first_logits: Tensor,
        params: SamplingParams,
        result: RequestOutput,
    ) -> Iterator[RequestOutput]:
        """Generate the `n` samples after a prefill."""
        prompt_tokens, metrics = len(result.prompt_token_ids), result.metrics
        room = self.max_model_len - prompt_tokens
        max_tokens = min(params.max_tokens or room, room)
        stop_ids = [*self.eos_token_ids, *(params.stop_token_ids or ())]
        start = time.perf_counter()
        for index in range(params.n):
            sampler = Sampler(params, result.prompt_token_ids, stop_ids, index)
            builder = OutputBuilder(index, params, self.tokenizer, self.eos_token_ids, max_tokens)
            result.outputs.append(builder.output)
            session.truncate(prompt_tokens)
            logits = first_logits
            while True:
                with torch.inference_mode():
                    token = sampler.sample(logits)
                    best = params.logprobs
                    row = (
                        None
                        if best is None
                        else top_logprobs(
                            logits[None], torch.tensor([token]), best, self.tokenizer
                        )[0]
                    )
                builder.push(token, row)
                metrics.output_tokens += 1
                if metrics.output_tokens == 1:
                    first = time.perf_counter() - start
                    metrics.time_to_first_token = metrics.prefill_seconds + first
                    start += first
                else:
                    metrics.decode_seconds = time.perf_counter() - start
                result.finished = builder.finished and index == params.n - 1
                yield _snapshot(result)
                if builder.finished:
                    break
                with torch.inference_mode():
                    logits = self._decode(session, token, prompt_tokens)

    def _decode(self, session: Session, token: int, prompt_tokens: int) -> Tensor:
        """[vocab] logits after one more token."""
        sequence = session.sequence
        temperature = self.dual_chunk.temperature(max(prompt_tokens, sequence.length + 1))
        if session.freeze_temperature and session.temperature is not None:
            temperature = session.temperature
        logits = decode_step(self.model, self.rotary, self.cache, sequence, token, temperature)
        session.extend([token], temperature)
        return logits

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position of a prompt, [tokens, vocab] float32: for tests and study.

        Raises:
            RequestError: as `check`, and when the result would exceed 1 GiB.
        """
        token_ids = list(token_ids)
        self.check(token_ids, SamplingParams(max_tokens=1))
        size = 4 * len(token_ids) * self.config.vocab_size
        if size > 1 << 30:
            raise RequestError(
                f"prompt_logits: expected at most 1 GiB of logits, got {format_bytes(size)}; "
                "use prompt_logprobs"
            )
        blocks: list[Tensor] = []
        session = Session(self.cache)
        try:
            with torch.inference_mode():
                prefill(
                    self.model,
                    self.rotary,
                    self.cache,
                    session.sequence,
                    token_ids,
                    temperature=self.dual_chunk.temperature(len(token_ids)),
                    chunk_tokens=self.chunk_tokens,
                    on_hidden=lambda _, hidden: blocks.append(self.model.logits(hidden)),
                )
        finally:
            session.close()
        return torch.cat(blocks)


def _snapshot(result: RequestOutput) -> RequestOutput:
    """A copy that later tokens do not change."""
    shot = copy(result)
    shot.metrics = RequestMetrics(**vars(result.metrics))
    shot.outputs = []
    for output in result.outputs:
        one = copy(output)
        one.token_ids = list(output.token_ids)
        one.logprobs = None if output.logprobs is None else list(output.logprobs)
        shot.outputs.append(one)
    return shot


def _choose_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda":
        # CUDA counts only when every op of the model has a kernel for it
        raise BackendError(
            "device: cuda was asked for, but this version has no CUDA kernels for "
            + ", ".join(op for op in ops.OP_NAMES if op not in ops.cuda_kernels())
        )
    return "cpu"


def _choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        if config.dtype == torch.float16:
            raise ConfigError(
                "dtype: the checkpoint is float16, which is not computed in; expected "
                'dtype="bfloat16" or "float32" to be chosen, got "auto"'
            )
        return config.dtype
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype: expected auto, bfloat16 or float32, got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _choose_rope(name: str, config: ModelConfig, where: str) -> DualChunkConfig:
    if name not in ("auto", "dca", "plain"):
        raise ConfigError(f"rope: expected auto, dca or plain, got {name!r}")
    if name == "dca" and config.dual_chunk.is_plain:
        raise ConfigError(
            f"rope: dca was asked for, but {where}/config.json has no dual_chunk_attention_config"
        )
    return PLAIN_ROPE if name == "plain" else config.dual_chunk
