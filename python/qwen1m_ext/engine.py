"""The engine: a loaded model that serves many requests at once.

This is the face: what can be chosen, and how a request becomes a handle. `assembly.py` loads and
reserves, `intake.py` refuses; the work is done by the threads of `core.py`, which live until
`shutdown` or until the engine is collected.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assembly import Parts, build_core
from .choices import (
    DTypeName,
    KVCacheName,
    KVOffloadName,
    RopeName,
    SpeculativeName,
    Wanted,
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    choose_rope,
)
from .config import load_config, load_generation_config
from .core import Span
from .device import Device, StreamDevice
from .errors import ConfigError, RequestError
from .events import EngineStats, OnEvent, OnProgress, RequestStatus
from .grammar import GrammarCompiler
from .handle import RequestHandle
from .heartbeat import Observer
from .intake import Intake
from .memory import available_bytes, format_bytes
from .offload import check_budget, check_options
from .output_processor import OutputProcessor
from .plan import PREFILL_CHUNK_TOKENS, Deployment, fit_context, memory_plan
from .prefill_policy import PrefillPolicy
from .request import AttentionName, SamplingParams
from .sampler import LogitsProcessor, Sampler
from .scheduler import Limits
from .scoring import PromptScorer
from .sequence import Request
from .sessions import Session
from .sparse_config import SparseSettings
from .speculative import NgramSpeculator
from .tokenizer import Tokenizer

MAX_SESSIONS = 64
"""Sessions that may be open at once. They share the pages of one full context."""


class Engine:
    """A model, its cache and its tokenizer. Every method may be called from any thread."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: DTypeName = "auto",
        kv_cache_dtype: KVCacheName = "auto",
        max_model_len: int | None = None,
        device: str | Device = "auto",
        rope: RopeName = "auto",
        attention: AttentionName = "auto",
        sparse_config: str | Path | None = None,
        sparse_settings: SparseSettings | None = None,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        load_tokenizer: bool = True,
        max_num_seqs: int = 64,
        max_itl_ms: float | None = None,
        max_chunk_ms: float | None = None,
        short_share: float = 0.5,
        enable_prefix_caching: bool = True,
        speculative: SpeculativeName | None = None,
        kv_offload: KVOffloadName | None = None,
        device_kv_bytes: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Load a checkpoint and reserve its cache.

        Args:
            model_dir: a Hugging Face Qwen2 checkpoint directory.
            dtype: of weights, activations and cache; "auto": as stored.
            kv_cache_dtype: "fp8": keys and values in e4m3 with a scale per layer and head, half the
                bytes of bf16 (docs/numerics.md has the accuracy); "auto": as `dtype`.
            max_model_len: most tokens of prompt plus output; None: the model's maximum, or what
                memory holds if that is less (reported as a warning).
            device: "cpu", "cuda", or "auto": a GPU if there is one that can do what is asked for
                (`choices.choose_device`). Tests bring a `Device` of their own.
            rope: "auto": as the config says; "dca": refuse a config without Dual Chunk Attention;
                "plain": ignore it, to see what it is for.
            attention: of prefills that do not choose (`SamplingParams.attention`). "dense": exact,
                and nothing is reserved for sparse prefill; "sparse": vertical-slash; "auto": sparse
                where the checkpoint has budgets and the prompt is long (`PrefillPolicy`).
            sparse_config: budgets in place of the checkpoint's sparse_attention_config.json.
            sparse_settings: how columns and diagonals are chosen; None: as the budgets were
                refined, or as published.
            prefill_chunk_tokens: tokens per prefill chunk.
            load_tokenizer: False: token ids in, token ids out.
            max_num_seqs: samples that run at once; others wait.
            max_itl_ms: most that a step may take while something decodes (a prefill's chunk is cut
                to fit); None: whole chunks.
            max_chunk_ms: the same while nothing decodes; None: whole chunks.
            short_share: of each step's prefill, what short prompts get beside a long one.
            enable_prefix_caching: reuse pages of earlier prompts that begin alike.
            speculative: "ngram": guess the next tokens from what followed the last ones before;
                the output is what it would be without, see `speculative.py`.
            kv_offload: "host": layers of the cache wait in host memory and are copied in their
                turn; the output is what it would be without, see `offload.py`.
            device_kv_bytes: with `kv_offload`, what the device may hold of the cache; None: two
                layers, the least.
            cuda_graphs: on a GPU, decode steps are captured when the engine starts, and replayed;
                False, or with layers in host memory: launched op by op.

        Raises:
            ConfigError, WeightsError: the checkpoint, or an argument above, does not fit.
            MemoryBudgetError: `max_model_len` tokens do not fit in memory, the device's or, with
                `kv_offload`, the host's.
            BackendError: the device is not available.
        """
        self.model_dir = Path(model_dir)
        self.config = load_config(model_dir)
        self.generation_config = load_generation_config(model_dir)
        self.tokenizer = Tokenizer(model_dir) if load_tokenizer else None
        if self.tokenizer and self.tokenizer.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"{model_dir}: tokenizer.json has {self.tokenizer.vocab_size} tokens, "
                f"but config.json says vocab_size {self.config.vocab_size}"
            )
        self.dtype = choose_dtype(dtype, self.config)
        self.kv_dtype = choose_kv_dtype(kv_cache_dtype, self.dtype)
        self.dual_chunk = choose_rope(rope, self.config, str(model_dir))
        limits = Limits(prefill_chunk_tokens, max_itl_ms, max_chunk_ms, max_num_seqs, short_share)
        self.policy = PrefillPolicy.load(
            attention,
            self.model_dir,
            self.config,
            str(self.dtype).removeprefix("torch."),
            sparse_config=sparse_config,
            settings=sparse_settings,
            plain=self.dual_chunk.is_plain,
            chunk_tokens=prefill_chunk_tokens,
        )
        if speculative not in (None, "ngram"):
            raise ConfigError(f"speculative: expected ngram or None, got {speculative!r}")
        check_options(kv_offload, device_kv_bytes)
        wanted = Wanted(self.config, self.dtype, self.kv_dtype, sparse=attention != "dense")
        self.device = choose_device(device, wanted)
        gpu = self.device if isinstance(self.device, StreamDevice) else None
        deployment = Deployment(
            tokens=0,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            chunk_tokens=prefill_chunk_tokens,
            max_seqs=max_num_seqs + MAX_SESSIONS,
            decode_rows=max_num_seqs,
            sparse=wanted.sparse,
            sparse_columns=self.policy.budgets.most_columns,
            gpu=gpu is not None,
            num_sms=gpu.num_sms if gpu else 0,
            cuda_graphs=cuda_graphs,
            speculative=speculative is not None,
            kv_offload=kv_offload is not None,
            device_kv_bytes=device_kv_bytes,
        )
        shape = replace(self.config, dual_chunk=self.dual_chunk)
        self.max_model_len = fit_context(
            shape, deployment, max_model_len, self.device.available_bytes(), available_bytes()
        )
        deployment = replace(deployment, tokens=self.max_model_len)
        self.plan = memory_plan(shape, deployment)
        check_budget(self.config, self.kv_dtype, self.max_model_len, device_kv_bytes)
        self.chunk_tokens = deployment.chunk
        self.step_tokens = self.chunk_tokens + max_num_seqs
        parts = Parts.load(
            self.model_dir, self.config, self.dual_chunk, self.policy, self.device, deployment
        )
        self.model, self.rotary, self.cache = parts.model, parts.rotary, parts.cache
        self.sparse, self.kv_exponents, self.model_key = parts.sparse, parts.kv_exponents, parts.key
        self.eos_token_ids = frozenset(
            self.generation_config.eos_token_ids or self.config.eos_token_ids
        )
        for token in self.eos_token_ids:
            if token >= self.config.vocab_size:
                raise ConfigError(
                    f"{model_dir}: eos_token_id: expected ids below vocab_size "
                    f"{self.config.vocab_size}, got {token}"
                )
        self._speculative = deployment.speculative
        self._grammars: GrammarCompiler | None = None
        self._grammar_lock = threading.Lock()
        tokenizer, eos = self.tokenizer, self.eos_token_ids
        self._core = build_core(
            parts,
            self.policy,
            deployment,
            replace(limits, chunk_tokens=self.chunk_tokens),
            enable_prefix_caching,
            lambda on_finish: OutputProcessor(tokenizer, eos, on_finish),
        )
        prefixes = self._core.scheduler.residency.prefixes
        self._intake = Intake(parts, self.policy, deployment, prefixes, tokenizer is not None)
        weakref.finalize(self, self._core.shutdown, False)

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
        self._intake.check(token_ids, params)

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
        session: Session | None = None,
        pin: bool = False,
        logits_processor: Callable[[int], LogitsProcessor] | None = None,
        json_schema: dict[str, Any] | None = None,
        grammar: str | None = None,
        on_event: OnEvent | None = None,
        on_progress: OnProgress | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> RequestHandle:
        """Queue a request; returns at once.

        Args:
            prompt: a text or token ids.
            params: how to sample; None: as generation_config.json recommends.
            prompt_text: the text of token ids, to be repeated in outputs.
            priority: lower runs first; equals run in order of submission.
            request_id: a name; None: request-1, request-2, ...
            session: a cache to continue in, and to leave prompt and output in.
            pin: keep the prompt's full pages from eviction until `unpin(request_id)`.
            logits_processor: makes one for each sample index; see `sampler.LogitsProcessor`.
            json_schema: what the output must be a document of; excludes `logits_processor`.
            grammar: what it must follow, in llguidance's dialect of Lark; excludes both.
            on_event: takes the events instead of the handle; see `events.OnEvent`.
            on_progress: takes the `Progress` events; see `events.OnProgress`.
            on_release: called when all that the request held is given back (`RequestHandle.wait`).

        Raises:
            As `check`; RequestError: also when the pin would be too large, the id is in use or the
                schema cannot be expressed.
            BackendError: the engine is shut down, or llguidance is not installed.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt: expected token ids, as no tokenizer is loaded")
            prompt_text, token_ids = prompt, self.tokenizer.encode(prompt)
        else:
            token_ids = list(prompt)
        params = self.default_sampling_params() if params is None else params
        self.check(token_ids, params)
        if json_schema is not None:
            logits_processor = self._grammar_compiler().json_schema(json_schema)
        elif grammar is not None:
            logits_processor = self._grammar_compiler().lark(grammar)
        scorer = None
        if params.prompt_logprobs is not None:
            scorer = PromptScorer(self.model, token_ids, params.prompt_logprobs)
        request = self._intake.request(
            token_ids, params, priority, request_id, session, pin, scorer
        )
        if scorer is not None:
            core = self._core
            scorer.on_complete = lambda rows: core.post(lambda: core.outputs.scored(request, rows))
        stop_ids = [*self.eos_token_ids, *(params.stop_token_ids or ())]
        for sample in request.samples:
            processor = logits_processor(sample.index) if logits_processor else None
            sample.sampler = Sampler(params, token_ids, stop_ids, sample.index, processor)
            if self._speculative:
                sample.speculator = NgramSpeculator()
        return self._start(request, prompt_text, on_event, on_progress, on_release)

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made when it is first needed."""
        if self.tokenizer is None:
            raise RequestError("json_schema: expected none, as no tokenizer is loaded")
        with self._grammar_lock:
            if self._grammars is None:
                self._grammars = GrammarCompiler(
                    self.tokenizer, self.config.vocab_size, sorted(self.eos_token_ids)
                )
            return self._grammars

    def _start(
        self,
        request: Request,
        prompt_text: str | None = None,
        on_event: OnEvent | None = None,
        on_progress: OnProgress | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> RequestHandle:
        core = self._core
        request.handle = RequestHandle(
            request.request_id,
            prompt_text,
            request.prompt,
            request.params,
            lambda: core.cancel(request),
            lambda: core.status(request),
            on_event,
            on_release,
        )
        request.on_progress = on_progress or request.handle.emit
        core.submit(request)
        return request.handle

    def open_session(self, *, freeze_temperature: bool = False) -> Session:
        """A cache that several requests share, for turns of a conversation; see `Session`."""
        return Session(self.cache, freeze_temperature)

    def unpin(self, request_id: str) -> bool:
        """Let the pages go that `submit(..., pin=True)` has kept; False if there are none."""
        return self._core.scheduler.residency.prefixes.unpin(request_id)

    @property
    def failure(self) -> BaseException | None:
        """What has ended the engine's threads, a bug; None while all is well."""
        return self._core.failure

    def observer(self, timeout: float) -> Observer:
        """Tells whether the engine is stuck, see `heartbeat.py`."""
        return self._core.observer(timeout)

    def stats(self) -> EngineStats:
        """Queues, pages and totals at this moment."""
        return self._core.stats()

    def statuses(self) -> dict[str, RequestStatus]:
        """Every request that is not finished, by id."""
        return self._core.statuses()

    def trace(self) -> list[Span]:
        """Begin to note what each thread does and when; the list grows from now on."""
        self._core.trace = []
        return self._core.trace

    def shutdown(self, drain: bool = True) -> None:
        """Take no more requests; finish those there are (`drain`) or cancel them. Idempotent."""
        self._core.shutdown(drain)

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position of a prompt, [tokens, vocab] float32: for tests and study.

        Raises:
            RequestError: as `check`, and when the result would exceed 1 GiB.
        """
        token_ids = list(token_ids)
        params = SamplingParams(temperature=0, max_tokens=1)
        self.check(token_ids, params)
        size = 4 * len(token_ids) * self.config.vocab_size
        if size > 1 << 30:
            raise RequestError(
                f"prompt_logits: expected at most 1 GiB of logits, got {format_bytes(size)}; "
                "use prompt_logprobs"
            )
        blocks: list[Tensor] = []
        model = self.model
        request = self._intake.request(
            token_ids, params, on_hidden=lambda _, hidden: blocks.append(model.logits(hidden).cpu())
        )
        request.samples[0].sampler = Sampler(params, token_ids)
        handle = self._start(request)
        handle.result()
        handle.wait()
        return torch.cat(blocks)
