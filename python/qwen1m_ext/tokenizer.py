"""Text to token ids and back: tokenizer.json (`tokenizers`) and chat templates (jinja2)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import read_json
from .errors import ConfigError, RequestError

Message = dict[str, Any]
"""A chat message: {"role": "user" | "assistant" | "system" | ..., "content": str, ...}."""


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, model_dir: str | Path) -> None:
        """Read tokenizer.json and, if there, tokenizer_config.json and chat_template.jinja.

        Raises:
            ConfigError: tokenizer.json is missing or not readable, or the template is not text.
        """
        directory = Path(model_dir)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: file not found (no other tokenizer format is read)")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a readable tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # a prompt is refused when too long, never cut
        self._tokenizer.no_padding()
        settings_path = directory / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        self.chat_template = _chat_template(directory, settings)
        self.eos_token = _token_text(settings.get("eos_token"))
        self.bos_token = _token_text(settings.get("bos_token"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        Raises:
            RequestError: the text holds a lone surrogate, so it is no Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: expected Unicode text, got a lone surrogate at character {error.start}"
            ) from None
        # encode_batch lets other threads run meanwhile, encode would stop them for seconds
        return list(self._tokenizer.encode_batch([text])[0].ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of half a character are no text by themselves."""
        text = self.decode([token_id], False)
        if "\ufffd" not in text:
            return text.encode()
        symbols = self._tokenizer.id_to_token(token_id) or ""
        if all(symbol in _BYTE_OF_SYMBOL for symbol in symbols):
            return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in symbols)
        return text.encode()

    def to_json(self) -> str:
        """The contents of tokenizer.json, as other libraries read them."""
        return str(self._tokenizer.to_str())

    def token_id(self, token: str) -> int | None:
        """Id of a token, None if there is no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """Render a conversation with the checkpoint's chat template.

        Raises:
            RequestError: no messages, a malformed message, no template, or the template objects;
                tools, or calls of them, and a template that does not know tools.
        """
        if not messages:
            raise RequestError("messages: expected at least one message, got none")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(
                    f"messages[{i}]: expected an object with a role, got {message!r}"
                )
            if not isinstance(message.get("content", ""), str):
                raise RequestError(
                    f"messages[{i}].content: expected a string, "
                    f"got {type(message['content']).__name__}"
                )
        if self.chat_template is None:
            raise RequestError("chat: the checkpoint has no chat template; use generate instead")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        called = tools or any("tool_calls" in message for message in messages)
        try:
            parsed = environment.parse(self.chat_template)
            if called and "tools" not in meta.find_undeclared_variables(parsed):
                raise RequestError(
                    "tools: expected none, as the checkpoint's chat template does not know them"
                )
            return environment.from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) if tools else None,
                eos_token=self.eos_token or "",
                bos_token=self.bos_token or "",
            )
        except RequestError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            raise RequestError(f"chat template: {error or type(error).__name__}") from None


class Detokenizer:
    """Text of a growing list of token ids, piece by piece.

    A piece is held back while it ends inside a UTF-8 character. Only the last few tokens are
    decoded anew at each step, so the cost does not grow with the length of the output.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here, so that joining rules see what came before
        self._read = 0  # text of the ids before this has been given out

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become certain."""
        self._ids.append(token_id)
        before, text = self._window()
        if text.endswith("\ufffd"):  # perhaps half a character; the next token will tell
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The text still held back, complete or not."""
        before, text = self._window()
        self._prefix = self._read = len(self._ids)
        return text[len(before) :]

    def _window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._ids[self._prefix : self._read], self._skip)
        return before, decode(self._ids[self._prefix :], self._skip)


def _byte_symbols() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes (GPT-2's table, inverted)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_symbols()


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # named templates; the one called "default" is meant
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"{directory / 'tokenizer_config.json'}: chat_template: expected a string, "
            f"got {type(template).__name__}"
        )
    return template
