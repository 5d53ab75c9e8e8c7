"""Structured output: a schema or grammar becomes a mask over the logits of every draw.

The grammars are those of llguidance (`pip install "qwen1m_ext[serve]"`). A mask forbids every token
after which the text could no longer become a document of the schema, so a finished sample always is
one; a sample that `max_tokens` cuts is the beginning of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import BackendError, RequestError
from .sampler import LogitsProcessor
from .tokenizer import Tokenizer

WHITESPACE = r"[ \n]{0,16}"
"""Between JSON's tokens: room to indent, and an end to it (a greedy model can repeat blanks)."""

ANY_OBJECT: dict[str, Any] = {"type": "object"}

_JSON_OPTIONS: Any = {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}

INLINE_JSON: dict[str, Any] = {"x-guidance": _JSON_OPTIONS}
"""To be added to a schema behind `%json` in a grammar, so that it is read as `json_schema` is."""


class GrammarCompiler:
    """Compiles schemas for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Build llguidance's view of a tokenizer; takes about a second for 152k tokens.

        Args:
            tokenizer: the checkpoint's.
            vocab_size: width of the logits, at least the tokenizer's.
            eos_token_ids: what may end a complete document.

        Raises:
            BackendError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise BackendError(
                "response_format: llguidance is not installed; "
                'pip install "qwen1m_ext[serve]" provides it'
            ) from None
        self._matcher = llguidance.LLMatcher
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64)
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(eos_token_ids)
        )

    def json_schema(self, schema: dict[str, Any]) -> Callable[[int], LogitsProcessor]:
        """Compile a schema; returns what makes the mask of sample `index` of a request.

        Raises:
            RequestError: the schema is none, or asks for what the grammars cannot express.
        """
        try:
            grammar = self._matcher.grammar_from_json_schema(
                json.dumps(schema), defaults=_JSON_OPTIONS
            )
        except (ValueError, RecursionError) as error:
            raise RequestError(f"response_format: the schema cannot be used: {error}") from None
        return self._checked(grammar, "response_format: the schema")

    def lark(self, grammar: str) -> Callable[[int], LogitsProcessor]:
        """The same of a grammar in llguidance's dialect of Lark, made of the schemas of tools."""
        return self._checked(grammar, "tools: a schema of theirs or of response_format")

    def _checked(self, grammar: str, what: str) -> Callable[[int], LogitsProcessor]:
        try:
            trouble = self._matcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            trouble = str(error)
        if trouble and not trouble.startswith("WARNING"):
            raise RequestError(f"{what} cannot be used: {trouble[:500]}")
        return lambda index: self._mask(grammar)

    def _mask(self, grammar: str) -> LogitsProcessor:
        """The state of one sample: a matcher that follows its tokens."""
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        seen = 0

        def mask(output: list[int], logits: Tensor) -> Tensor:
            nonlocal seen
            for token in output[seen:]:
                if not matcher.is_stopped():
                    matcher.consume_token(token)
            seen = len(output)
            if matcher.is_error():
                raise RequestError(f"grammar: {matcher.get_error()[:500]}")
            masked = torch.full_like(logits, -torch.inf)
            if matcher.is_stopped():
                allowed = self._eos
            else:
                bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
                flags = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
                allowed = flags.flatten()[: len(logits)].nonzero()[:, 0]
            masked[allowed] = logits[allowed]
            return masked

        return mask
