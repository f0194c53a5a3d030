"""`/v1/chat/completions`: the Structs of request, response and stream chunk."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from specserve.server.protocol.fields import Count, GenerationFields, TopLogprobs
from specserve.server.protocol.prompt_logprobs import PromptEntries
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.chat_messages import MAX_MESSAGES, MAX_NAME, ROLES
from specserve.text.chat_tools import MAX_TOOLS
from specserve.types import FinishReason, RequestError

MESSAGE_SCHEMA: dict[str, Any] = {
    "title": "Message",
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}},
                {"type": "null"},
            ]
        },
        "name": {"type": ["string", "null"], "maxLength": MAX_NAME},
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_call_id": {"type": ["string", "null"]},
    },
    "required": ["role"],
}
_MESSAGE: dict[str, Any] = {"$ref": "#/components/schemas/Message"}
Messages = Annotated[
    list[Annotated[dict[str, Any], Meta(extra_json_schema=_MESSAGE)]],
    Meta(min_length=1, max_length=MAX_MESSAGES),
]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Messages  # their content is checked by `text.chat_messages`
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    store: Literal[False] | None = None

    def renamed(self, error: RequestError) -> RequestError:
        """An error of the engine, with the name that the field has in this request."""
        names = {"prompt": "messages"}
        if self.reasoning_effort is not None:
            names["chat_template_kwargs.reasoning_effort"] = "reasoning_effort"
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return RequestError(names.get(error.param, error.param), error.message)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        effort = self.reasoning_effort
        named = {} if effort is None else {"reasoning_effort": effort}
        return (self.chat_template_kwargs or {}) | named

    @property
    def requested_max_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "only allowed when logprobs is true")
        if self.tools is not None and self.tool_choice is None:
            raise RequestError(
                "tools", "calling tools is not supported yet; with tool_choice none they are shown"
            )
        older, newer = self.max_tokens, self.max_completion_tokens
        if older is not None and newer is not None and older != newer:
            raise RequestError(
                "max_tokens", f"{older} contradicts max_completion_tokens {newer}; send one of them"
            )


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...]


class TokenLogprob(TopLogprob, frozen=True):
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(Struct, frozen=True):
    content: tuple[TokenLogprob, ...]
    refusal: None = None


class ChatMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    drafter_ids: tuple[int, ...] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    metrics: Metrics
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptEntries | UnsetType = UNSET


class ChatDelta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    drafter_ids: tuple[int, ...] | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    metrics: Metrics | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET
