"""Log probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import Logprob, TokenLogprobs
from ..tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, or OpenAI's `bytes:` form of one that is part of a character."""
    text = tokenizer.decode([token], False)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], rows: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": _value(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = []
    for token, row in zip(tokens, rows, strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank)[:top]
        content.append(entry(token, row[token]) | {"top_logprobs": [entry(*item) for item in best]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    rows: Sequence[TokenLogprobs | None],
    top: int,
    offset: int = 0,
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion; a row of None is the first token of a prompt."""
    result: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    for token, row in zip(tokens, rows, strict=True):
        text = token_text(tokenizer, token)
        result["tokens"].append(text)
        result["text_offset"].append(offset)
        offset += len(text)
        if row is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        result["token_logprobs"].append(_value(row[token]))
        best = sorted(row.items(), key=lambda item: item[1].rank)[:top]
        result["top_logprobs"].append(
            {
                token_text(tokenizer, other): _value(entry)
                for other, entry in [*best, (token, row[token])]
            }
        )
    return result
