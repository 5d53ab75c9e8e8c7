"""`LLM`: the engine behind the names and shapes of vLLM, so that existing scripts run unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from torch import Tensor
from tqdm import tqdm

from .choices import DTypeName, KVCacheName, KVOffloadName, RopeName, SpeculativeName
from .device import Device
from .engine import Engine
from .errors import RequestError
from .events import OnProgress
from .handle import RequestHandle
from .plan import PREFILL_CHUNK_TOKENS
from .request import AttentionName, RequestOutput, SamplingParams
from .sessions import Session
from .sparse_config import SparseSettings
from .tokenizer import Message, Tokenizer


class TokensPrompt(TypedDict):
    """A prompt that is already token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt as text, in vLLM's dictionary form."""

    prompt: str


Prompt = str | TokensPrompt | TextPrompt


class LLM:
    """A model that generates text from prompts of up to a million tokens.

    Example:
        >>> llm = LLM("path/to/Qwen2.5-7B-Instruct-1M")
        >>> outputs = llm.generate("Hello", SamplingParams(max_tokens=8))
        >>> outputs[0].outputs[0].text
    """

    def __init__(
        self,
        model: str | Path,
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
        skip_tokenizer_init: bool = False,
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
        """Load a checkpoint directory; arguments and errors as in `Engine`."""
        self.engine = Engine(
            model,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            device=device,
            rope=rope,
            attention=attention,
            sparse_config=sparse_config,
            sparse_settings=sparse_settings,
            prefill_chunk_tokens=prefill_chunk_tokens,
            load_tokenizer=not skip_tokenizer_init,
            max_num_seqs=max_num_seqs,
            max_itl_ms=max_itl_ms,
            max_chunk_ms=max_chunk_ms,
            short_share=short_share,
            enable_prefix_caching=enable_prefix_caching,
            speculative=speculative,
            kv_offload=kv_offload,
            device_kv_bytes=device_kv_bytes,
            cuda_graphs=cuda_graphs,
        )

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus output."""
        return self.engine.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises RequestError if none was loaded."""
        if self.engine.tokenizer is None:
            raise RequestError("tokenizer: expected one, got skip_tokenizer_init=True")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling that generation_config.json recommends."""
        return self.engine.default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; they run together (continuous batching).

        Args:
            prompts: a text, `{"prompt_token_ids": [...]}`, or a list of these.
            sampling_params: one for all or one for each; None: the checkpoint's defaults.
            use_tqdm: show a bar over the prompts.
            on_progress: called during each prefill; raising stops all prompts.

        Returns:
            One finished `RequestOutput` per prompt, in order.

        Raises:
            RequestError: a bad prompt or parameter. All are checked before any is run.
        """
        single = isinstance(prompts, str | dict)
        items = cast("list[Prompt]", [prompts] if single else list(prompts))
        params = self._params_for(sampling_params, len(items))
        requests = [(*self._tokens(p), s) for p, s in zip(items, params, strict=True)]
        for _, token_ids, sampling in requests:
            self.engine.check(token_ids, sampling)
        handles = []
        try:
            for text, token_ids, sampling in requests:
                handles.append(
                    self.engine.submit(
                        token_ids, sampling, prompt_text=text, on_progress=on_progress
                    )
                )
            bar = tqdm(handles, disable=not use_tqdm, unit="prompt")
            return [handle.result() for handle in bar]
        finally:
            _close(handles)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_progress: OnProgress | None = None,
        session: Session | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt; yields the state after every token. Closing the iterator aborts.

        With a `session` (see `open_session`) the cache is kept for the next prompt, also after an
        abort: what both have in common is not computed again.
        """
        text, token_ids = self._tokens(prompt)
        params = self._params_for(sampling_params, 1)[0]
        handle = self.engine.submit(
            token_ids, params, prompt_text=text, session=session, on_progress=on_progress
        )
        try:
            yield from handle.outputs()
        finally:
            _close([handle])

    def open_session(self, *, freeze_temperature: bool = False) -> Session:
        """A cache for the turns of one conversation; close it when done. See `Session`."""
        return self.engine.open_session(freeze_temperature=freeze_temperature)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_progress: OnProgress | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the checkpoint's chat template."""
        single = not messages or isinstance(messages[0], dict)
        conversations = cast("list[Sequence[Message]]", [messages] if single else list(messages))
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = [
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tools=tools
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_progress=on_progress)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[tokens, vocab] float32 logits of a short prompt: for tests and study."""
        return self.engine.prompt_logits(token_ids)

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(
                f"sampling_params: expected one for each of {count} prompts, got {len(params)}"
            )
        return list(params)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt in any of its forms."""
        if isinstance(prompt, dict) and isinstance(prompt.get("prompt_token_ids"), list):
            ids = prompt["prompt_token_ids"]  # type: ignore[typeddict-item]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise RequestError("prompt_token_ids: expected a list of integers")
            return None, ids
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str):
            raise RequestError(
                'prompt: expected a string or {"prompt_token_ids": [...]}, '
                f"got {type(prompt).__name__}"
            )
        return text, self.get_tokenizer().encode(text)


def _close(handles: list[RequestHandle]) -> None:
    """Stop what still runs and wait until nothing is held."""
    for handle in handles:
        handle.cancel()
    for handle in handles:
        handle.wait()
