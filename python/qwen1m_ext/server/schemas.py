"""What the bodies of requests may say. A field that is not understood is refused, not ignored.

OpenAI's names; the fields that OpenAI does not have are vLLM's and are marked. Ranges that the
engine checks (`SamplingParams`) are not repeated here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SAMPLES = 128
MAX_PROMPTS = 1024  # of one /v1/completions request
MAX_LOGPROBS = 20


class Body(BaseModel):
    """A strict object; a null stands for an absent field, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: entry for name, entry in value.items() if entry is not None}
        return value


class StreamOptions(Body):
    """`include_usage`: a last chunk without choices has the usage."""

    include_usage: bool = False


class JsonSchema(Body):
    """A named schema; `strict` is always meant."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    """Text, any JSON object, or a document of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Stop = str | Annotated[list[str], Field(max_length=64)]


class GenerationBody(Body):
    """What chats and completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    max_tokens: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    # this server's
    attention: Literal["auto", "dense", "sparse"] | None = None  # of the prompt's prefill
    session: str | None = None  # an open session: its cache is used and extended
    pin: bool = False  # keep the prompt's pages in the prefix cache
    return_progress: bool = False  # chunks with `prompt_progress` while the prompt is read
    # Without influence on the result.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None


class TextPart(Body):
    """A part of a message; nothing but text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message; the role `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None

    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    continue_session: bool = False  # this server's: messages follow what the session holds
    max_completion_tokens: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None  # there are none
    modalities: list[Literal["text"]] | None = None


TokenIds = list[int]


class CompletionBody(GenerationBody):
    """POST /v1/completions: text or token ids, one prompt or several."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


class OpenSessionBody(Body):
    """POST /v1/sessions."""

    id: str
    freeze_temperature: bool = False
