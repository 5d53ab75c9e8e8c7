"""From chosen tokens to what the user sees: text, stop conditions, finish reason."""

from __future__ import annotations

from collections.abc import Collection

from .request import CompletionOutput, SamplingParams, TokenLogprobs
from .tokenizer import Detokenizer, Tokenizer


class StopStrings:
    """Finds the first stop string in a growing text and tells how much text is safe to show."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)

    def find(self, text: str, new_from: int) -> tuple[int, str] | None:
        """Earliest (position, stop string) that ends after `new_from`, where new text began."""
        start = max(0, new_from - self._longest + 1)
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop, start)) >= 0]
        # among stops at one position the longest: "ab" must not win over "abc" by list order
        return min(hits, key=lambda hit: (hit[0], -len(hit[1])), default=None)

    def held_back(self, text: str) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class OutputBuilder:
    """Grows one `CompletionOutput` token by token and decides when it is complete."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        max_tokens: int,
    ) -> None:
        """Start sample `index`; `max_tokens` is what parameters and context length allow."""
        self.output = CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._params, self._eos, self._max_tokens = params, frozenset(eos_token_ids), max_tokens
        self._detokenizer = (
            Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer else None
        )
        self._stops = StopStrings(params.stop_list)
        self._text = ""  # all of it, including what is held back from the output

    @property
    def finished(self) -> bool:
        """Whether the sample is complete."""
        return self.output.finish_reason is not None

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add a token."""
        out, params = self.output, self._params
        out.token_ids.append(token)
        if logprobs is not None and out.logprobs is not None:
            out.logprobs.append(logprobs)
            out.cumulative_logprob = (out.cumulative_logprob or 0.0) + logprobs[token].logprob
        enough = len(out.token_ids) >= params.min_tokens
        if enough and not params.ignore_eos and token in self._eos:
            return self._finish("stop", None)
        if enough and token in (params.stop_token_ids or ()):
            if params.include_stop_str_in_output:
                self._extend(token)
            return self._finish("stop", token)
        seen = len(self._text)
        self._extend(token)
        if enough and (hit := self._stops.find(self._text, seen)):
            at, stop = hit
            end = at + len(stop) if params.include_stop_str_in_output else at
            self._text = self._text[:end]
            self._detokenizer = None  # what it still holds back comes after the stop string
            return self._finish("stop", stop)
        if len(out.token_ids) >= self._max_tokens:
            return self._finish("length", None)
        out.text = self._text[: len(self._text) - self._stops.held_back(self._text)]
        return None

    def flush(self) -> str:
        """The text that was held back, for a sample that is stopped from outside."""
        shown = len(self.output.text)
        if self._detokenizer:
            self._text += self._detokenizer.flush()
        self.output.text = self._text
        return self._text[shown:]

    def _extend(self, token: int) -> None:
        if self._detokenizer:
            self._text += self._detokenizer.push(token)

    def _finish(self, reason: str, stop_reason: str | int | None) -> None:
        if self._detokenizer:
            self._text += self._detokenizer.flush()
        self.output.text = self._text
        self.output.finish_reason = "stop" if reason == "stop" else "length"
        self.output.stop_reason = stop_reason
