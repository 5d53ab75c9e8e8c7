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
MAX_TOOLS = 128


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


class FunctionCall(Body):
    """A call that the model has made; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class CallEntry(Body):
    """One of an assistant's calls, as its answer told it."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Body):
    """One message; the role `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: Annotated[list[CallEntry], Field(min_length=1)] | None = None  # of an assistant
    tool_call_id: str | None = None  # of a tool: the call whose result the content is

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: expected with the role assistant only")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id: expected with the role tool, and only with it")
        return self

    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Function(Body):
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # nothing: it takes no arguments
    strict: bool | None = None  # calls have to follow `parameters`, also where calling is optional


class Tool(Body):
    """Functions are the only kind of tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """One of the functions."""

    name: str


class NamedToolChoice(Body):
    """This function has to be called, once."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    continue_session: bool = False  # this server's: messages follow what the session holds
    max_completion_tokens: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None  # False: one call at most
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
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
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
