"""From a request's body to what the engine takes: token ids, sampling parameters, a grammar."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine_process import EngineProcess, SessionProxy
from ..errors import ContextTooLong, RequestError
from ..grammar import ANY_OBJECT
from ..request import SamplingParams
from ..tokenizer import Message, Tokenizer
from .errors import ApiError
from .schemas import MAX_PROMPTS, ChatBody, ChatMessage, CompletionBody, GenerationBody, Tool
from .tools import template_messages, template_tools

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "min_tokens", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "include_stop_str_in_output", "attention",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text if it was text, and its token ids."""

    text: str | None
    token_ids: list[int]


def chat_prompt(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    tools: list[Tool] | None = None,
    generate: bool = True,
) -> Prompt:
    """A conversation through the checkpoint's template."""
    rendered = tokenizer.apply_chat_template(
        template_messages(messages), add_generation_prompt=generate, tools=template_tools(tools)
    )
    return Prompt(rendered, tokenizer.encode(rendered))


def continued_prompt(
    engine: EngineProcess, tokenizer: Tokenizer, session: SessionProxy, messages: list[ChatMessage]
) -> Prompt:
    """New messages after the tokens of a session, whose text nobody has to send again.

    What a template writes between an answer and the next message is found by rendering an answer
    that can be recognised before them.
    """
    answer = "\u2039the answer before\u203a"
    before: list[Message] = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": answer},
    ]
    rendered = tokenizer.apply_chat_template([*before, *template_messages(messages)])
    _, found, turn = rendered.partition(answer)
    if not found:
        raise ApiError(400, "continue_session: the chat template leaves out earlier answers")
    cached, drawn = session.tokens()
    drawn = [token for token in drawn if token not in engine.eos_token_ids]
    return Prompt(None, cached + drawn + tokenizer.encode(turn))


def completion_prompts(tokenizer: Tokenizer, body: CompletionBody) -> list[Prompt]:
    """The prompts of a completion request, in order."""
    if isinstance(body.prompt, str):
        return [Prompt(body.prompt, tokenizer.encode(body.prompt))]
    prompts: list[Prompt] = []
    ids: list[int] = []
    for entry in body.prompt:
        if isinstance(entry, str):
            prompts.append(Prompt(entry, tokenizer.encode(entry)))
        elif isinstance(entry, list):
            prompts.append(Prompt(None, entry))
        else:
            ids.append(entry)
    if not prompts:  # one prompt of token ids
        prompts.append(Prompt(None, ids))
    if len(prompts) * body.n > MAX_PROMPTS:
        raise ApiError(
            400,
            f"n: expected at most {MAX_PROMPTS} samples of all prompts together, "
            f"got {len(prompts)} prompts times {body.n}",
            param="n",
        )
    for field in ("session", "pin"):
        if getattr(body, field) and len(prompts) > 1:
            raise ApiError(400, f"{field}: expected a single prompt, got several", param=field)
    return prompts


def sampling_params(
    engine: EngineProcess, body: GenerationBody, constrained: bool = False
) -> SamplingParams:
    """The checkpoint's defaults, with what the body says; `constrained`: a grammar ends the output.

    Raises:
        RequestError: a value out of range.
    """
    given = {name: getattr(body, name) for name in _PLAIN if getattr(body, name) is not None}
    if isinstance(body, ChatBody):
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens: expected it or max_completion_tokens, got both")
        max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        given["max_tokens"] = max_tokens
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: expected together with logprobs true")
        if body.logprobs:
            given["logprobs"] = body.top_logprobs or 0
        scoring = False
    else:
        assert isinstance(body, CompletionBody)
        max_tokens = given["max_tokens"] = 16 if body.max_tokens is None else body.max_tokens
        given["logprobs"] = body.logprobs
        if body.best_of not in (None, body.n):
            raise ApiError(400, f"best_of: expected n ({body.n}) or nothing, got {body.best_of}")
        if body.echo and body.logprobs is not None:
            given["prompt_logprobs"] = body.logprobs
        scoring = body.echo
    if max_tokens == 0:
        if not scoring:
            raise ApiError(
                400,
                "max_tokens: expected >= 1 (or 0 together with echo), got 0",
                param="max_tokens",
            )
        given["max_tokens"] = 1  # its token is not shown
    if body.logit_bias is not None:
        given["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    if constrained and (body.min_tokens or body.ignore_eos):
        raise ApiError(
            400,
            "min_tokens, ignore_eos: expected neither with response_format or a grammar of tools",
        )
    defaults = engine.default_sampling_params()
    return replace(defaults, n=body.n, **given)


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 12:
        raise RequestError(f"logit_bias: expected token ids as keys, got {key!r}")
    return int(key)


def json_schema(body: GenerationBody) -> dict[str, object] | None:
    """The schema that the output must follow; None: free text."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None:
        raise ApiError(400, "response_format.json_schema: expected an object with a schema")
    return wanted.json_schema.schema_


def check_room(engine: EngineProcess, prompt: Prompt, max_tokens: int | None) -> None:
    """Refuse, with both numbers, what `max_model_len` would cut short.

    Raises:
        ContextTooLong: prompt and requested output together are too long.
    """
    if max_tokens is not None and len(prompt.token_ids) + max_tokens > engine.max_model_len:
        raise ContextTooLong(
            f"prompt: the context length is {engine.max_model_len} tokens, but the prompt has "
            f"{len(prompt.token_ids)} and max_tokens asks for {max_tokens} more; "
            "nothing was truncated"
        )
