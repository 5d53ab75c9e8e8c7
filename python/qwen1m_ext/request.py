"""The nouns that callers meet: sampling parameters and what comes back. Names follow vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from .config import GenerationConfig
from .errors import RequestError

AttentionName = Literal["auto", "dense", "sparse"]
ATTENTION_NAMES: tuple[AttentionName, ...] = ("auto", "dense", "sparse")

FinishReason = Literal["stop", "length", "abort"]


def _is_number(value: object, low: float, high: float) -> bool:
    """A number, finite because the bounds are; an int of any size compares without overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass
class SamplingParams:
    """How the next token is chosen and when generation ends.

    The order of the steps is that of vLLM: logit_bias, penalties, temperature, min_p, top_k,
    top_p, draw. `logprobs` are those of the unmodified distribution.

    Raises:
        RequestError: a value out of range; the text names it.
    """

    n: int = 1  # independent samples of one prompt; the prompt is prefilled once
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the smallest set with at least this probability
    top_k: int = 0  # keep the k most likely; 0 or -1: all
    min_p: float = 0.0  # keep what has at least min_p times the largest probability
    repetition_penalty: float = 1.0  # on tokens of prompt and output: divides positive logits
    presence_penalty: float = 0.0  # subtracted once per distinct output token
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output
    logit_bias: dict[int, float] | None = None  # token id -> addend
    seed: int | None = None  # None: drawn from the operating system
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0  # before this many tokens neither EOS nor a stop token ends the output
    stop: str | list[str] | None = None  # texts that end the output; not part of it by default
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # of this many best tokens and the chosen one
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    attention: AttentionName | None = None  # of this prompt's prefill; None: the engine's choice

    def __post_init__(self) -> None:
        """Check every value, so that a bad one is refused before any work is done."""

        def number(name: str, low: float, high: float, expected: str) -> None:
            value = getattr(self, name)
            if not _is_number(value, low, high):
                raise RequestError(f"{name}: expected {expected}, got {value!r}")

        def integer(name: str, low: int, expected: str, optional: bool = False) -> None:
            value = getattr(self, name)
            if value is None and optional:
                return
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RequestError(f"{name}: expected {expected}, got {value!r}")

        integer("n", 1, "an integer >= 1")
        number("temperature", 0.0, 1e6, "a number >= 0")
        number("top_p", 0.0, 1.0, "a number in (0, 1]")
        if self.top_p == 0.0:
            raise RequestError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        integer("top_k", -1, "an integer >= 1, or 0 or -1 for all")
        number("min_p", 0.0, 1.0, "a number in [0, 1]")
        number("repetition_penalty", 1e-6, 1e6, "a number > 0")
        number("presence_penalty", -2.0, 2.0, "a number in [-2, 2]")
        number("frequency_penalty", -2.0, 2.0, "a number in [-2, 2]")
        integer("seed", -(1 << 63), "an integer of 64 bits", optional=True)
        integer("max_tokens", 1, "an integer >= 1 or None", optional=True)
        integer("min_tokens", 0, "an integer >= 0")
        integer("logprobs", 0, "an integer >= 0 or None", optional=True)
        integer("prompt_logprobs", 0, "an integer >= 0 or None", optional=True)
        if self.seed is not None and self.seed >= 1 << 63:
            raise RequestError(f"seed: expected an integer of 64 bits, got {self.seed!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: expected at most max_tokens {self.max_tokens}, got {self.min_tokens}"
            )
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.attention not in (*ATTENTION_NAMES, None):
            expected = ", ".join(ATTENTION_NAMES)
            raise RequestError(f"attention: expected {expected} or None, got {self.attention!r}")
        if not all(isinstance(text, str) and text for text in self.stop_list):
            raise RequestError(f"stop: expected non-empty strings, got {self.stop!r}")
        tokens = [] if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(tokens, list | tuple) or not all(map(_is_token, tokens)):
            raise RequestError(f"stop_token_ids: expected a list of token ids, got {tokens!r}")
        biases = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, dict):
            raise RequestError(f"logit_bias: expected {{token id: number}}, got {biases!r}")
        for token, bias in biases.items():
            if not _is_token(token) or not _is_number(bias, -1e6, 1e6):
                raise RequestError(
                    "logit_bias: expected {token id: number in [-1e6, 1e6]}, "
                    f"got {token!r}: {bias!r}"
                )

    @property
    def stop_list(self) -> list[str]:
        """The stop texts as a list."""
        if self.stop is None:
            return []
        return list(self.stop) if isinstance(self.stop, list | tuple) else [self.stop]

    @classmethod
    def from_defaults(cls, defaults: GenerationConfig, max_tokens: int | None) -> SamplingParams:
        """The sampling that the checkpoint recommends in generation_config.json."""
        values = {
            f.name: value
            for f in fields(cls)
            if (value := getattr(defaults, f.name, None)) is not None
        }
        if defaults.do_sample is False:
            values["temperature"] = 0.0
        return cls(**values, max_tokens=max_tokens)


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None  # None while it runs
    stop_reason: str | int | None = None  # the stop text or token that ended it


@dataclass
class RequestMetrics:
    """What a request cost. Times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from a cache
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0  # from the first token to the last, all samples
    output_tokens: int = 0
    sparse: bool = False  # whether the prompt was prefilled sparsely
    recall: float | None = None  # softmax mass that the selected keys held, on sampled rows
    draft_tokens: int = 0  # guessed by speculation and checked
    accepted_tokens: int = 0  # of these, sampled as guessed

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were computed, per second of prefill."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Output tokens after the first per second of decoding."""
        return (self.output_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class RequestOutput:
    """The state of a request; `finished` tells whether it is the last one."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from a cache (OpenAI: prompt_tokens_details.cached_tokens)."""
        return self.metrics.cached_tokens
